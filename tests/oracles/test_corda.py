"""CorDA against peft, against dense linear algebra in float64, and through save, load, recipe and plan."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch
import yaml

import graftwork
import tiny
from graftwork.errors import UsageError
from graftwork.initializers.corda import Covariance
from training_support import completions, folder, recipe, run, write_rows

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def preprocess_corda(monkeypatch):
    """peft's; its module takes `dataclass` from the package attrs, which peft does not require."""
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    return importlib.import_module("peft.tuners.lora.corda").preprocess_corda


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def batches(n=6, rows=4, width=24, seed=3, high=tiny.VOCAB):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        ids = torch.randint(3, high, (rows, width), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return made


def started(model=None, data=None, *, r=4, targets=TARGETS, **options):
    model = model or tiny.llama()
    return model, graftwork.attach(model, "lora", r=r, alpha=2 * r, target_modules=targets, batches=data or batches(),
                                   initializer={"method": "corda", **options})


def inputs_of(model, name, batch):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    return seen[0]


def covariance(model, name, data):
    """C in float64, before damping, sample by sample."""
    total, count = 0, 0
    for batch in data:
        x = inputs_of(model, name, batch).double()
        for row, mask in zip(x, batch["attention_mask"]):
            own = row[mask.bool()]
            own = own / own.abs().max()
            total, count = total + own.T @ own, count + 1
    return total / count


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("build, targets", [(tiny.llama, TARGETS), (tiny.gpt2, ["c_attn", "c_fc"])])
def test_factors_equal_peft_on_the_same_covariance(mode, build, targets, tmp_path, preprocess_corda):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig

    data, theirs = batches(), build()
    ours, graft = started(build(), data, targets=targets, mode=mode)
    plain = logits(theirs)
    torch.save({n: covariance(theirs, n, data).float() for n in graft.adapters}, tmp_path / "c.pt")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method=mode, covariance_file=str(tmp_path / "c.pt")))
    preprocess_corda(theirs, config)
    peft = get_peft_model(theirs, config)
    for name, adapter in graft.adapters.items():
        layer = peft.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, B @ A, atol=2e-4, rtol=1e-2)
        for mine, other in ((adapter.lora_A, A), (adapter.lora_B.T, B.T)):  # up to the sign of each component
            assert torch.nn.functional.cosine_similarity(mine, other).abs().min() > 0.999
            torch.testing.assert_close(mine.norm(dim=1), other.norm(dim=1), atol=1e-4, rtol=5e-3)
    torch.testing.assert_close(logits(ours), plain, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits(peft), plain, atol=2e-4, rtol=1e-3)
    with graft.disabled():
        assert torch.equal(logits(ours), plain)


def test_the_covariance_of_a_sample_is_peft_s_up_to_its_scale(preprocess_corda):
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig

    (one,) = batches(1, 1)
    theirs = tiny.llama()
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method="ipm", prune_temporary_fields=False))
    preprocess_corda(theirs, config, run_model=lambda: theirs(one["input_ids"]))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        C = Covariance()
        C.update(inputs_of(tiny.llama(), name, one), one["attention_mask"])
        other = theirs.get_submodule(name).covariance_matrix
        torch.testing.assert_close(C.total / C.total.norm(), other / other.norm(), atol=1e-6, rtol=1e-4)


def test_covariances_are_means_over_unpadded_samples_and_shared_by_modules_with_one_input():
    data = batches(3)
    data[1]["attention_mask"][:, :9] = 0
    model = tiny.llama()
    start = graftwork.initializers.corda.CorDAInitializer(graftwork.registry.make_config("initializer", "corda", samples=10))
    sites = graftwork.modeling.sites.find_sites(model, "all-linear")
    found = start.statistics(model, sites, None, iter(data))
    few = [*data[:2], {k: v[:2] for k, v in data[2].items()}]  # 4 + 4 + 2 samples
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        C = covariance(model, name, few)
        torch.testing.assert_close(found[name].total.double() / found[name].count, C, atol=1e-5, rtol=1e-4)
        damped = found[name].damped(0.5)
        torch.testing.assert_close(damped, C + 0.5 * C.diagonal().mean() * torch.eye(len(C)), atol=1e-5, rtol=1e-4)
    layer = "model.layers.0."
    assert found[f"{layer}self_attn.q_proj"] is found[f"{layer}self_attn.v_proj"]
    assert found[f"{layer}mlp.gate_proj"] is found[f"{layer}mlp.up_proj"]
    assert len({id(c) for c in found.values()}) == 4 * tiny.LAYERS
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_ipm_takes_the_most_and_kpm_the_least_of_what_the_data_see():
    """The part taken away costs |s B A C| = the root of its squared singular values: the best and the worst rank-r choice."""
    data = batches()
    name = "model.layers.0.mlp.down_proj"
    costs = {}
    for mode in ("ipm", "kpm"):
        model, graft = started(data=data, mode=mode, damp=0.05)
        model.requires_grad_(False)
        C = covariance(tiny.llama(), name, data)
        C = C + 0.05 * C.diagonal().mean() * torch.eye(len(C))
        W, adapter = model.get_submodule(name).weight.double(), graft.adapters[name]
        part, S = adapter.scale * (adapter.lora_B.double() @ adapter.lora_A.double()), torch.linalg.svdvals(W @ C)
        costs[mode] = float((part @ C).norm())
        kept = S[:4] if mode == "ipm" else S[-4:]
        assert costs[mode] == pytest.approx(float(kept.norm()), rel=1e-3)
        assert float(((W - part) @ C).norm()) == pytest.approx(float((S.square().sum() - kept.square().sum()).sqrt()), rel=1e-3)
    assert costs["ipm"] > 20 * costs["kpm"]


@pytest.mark.parametrize("options", [{"mode": "kpm"}, {"samples": 3}, {"damp": 1.0}])
def test_each_option_shows(options):
    plain, other = started()[1], started(**options)[1]
    assert all(not torch.allclose(a.lora_A, b.lora_A, rtol=1e-2) for a, b in zip(plain.adapters.values(), other.adapters.values()))


def test_it_exports_as_rank_2r_and_trains_and_slices_of_fused_maps_are_sites():
    model, graft = started(tiny.gpt2(), targets=["q", "v"], r=3)
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    trained = logits(model)
    pairs, error = graft.to_lora()
    assert error == 0 and all(A.shape[0] == 6 for _, A in pairs.values())
    fresh = tiny.gpt2()
    with torch.no_grad():
        for name, (B, A) in pairs.items():
            site = graft.sites[name]
            fresh.get_submodule(site.module_name).weight[:, site.rows] += (B @ A).T
    torch.testing.assert_close(logits(fresh), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_it_survives_saving_and_only_the_residual_is_quantized(storage, tmp_path):
    tiny.save(tiny.llama(), tmp_path / "base")

    def load():
        return graftwork.load(tmp_path / "base", storage=storage, dtype="fp32")[0]

    model, name = load(), "model.layers.0.mlp.down_proj"
    before = logits(model)
    _, graft = started(model)
    if storage:
        adapter, module = graft.adapters[name], model.get_submodule(name)
        W = model.graft_source.read(name + ".weight", dtype=torch.float32)
        wanted = type(module).plain_class.from_weight(W - adapter.lora_B0 @ adapter.lora_A0, model.graft_storage,
                                                      dtype=module.compute_dtype)
        assert torch.equal(module.dequantize(), wanted.dequantize())
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    trained = logits(model)
    graft.save(tmp_path / "graft")
    again = load()
    loaded = graftwork.attach_saved(again, tmp_path / "graft")
    assert torch.equal(logits(again), trained)
    for one, where in ((graft, model), (loaded, again)):
        one.detach()
        assert torch.equal(logits(where), before)


@pytest.mark.slow
def test_a_recipe_looks_at_its_own_file_and_a_plan_counts_the_frozen_pair(tmp_path):
    base, file = folder(tmp_path), completions(tmp_path / "d.jsonl")
    facts = write_rows(tmp_path / "facts.jsonl", [{"prompt": "as it at", "completion": " or"} for _ in range(5)])
    starts = []
    for extra in ({}, {"data": str(facts)}):
        document = recipe(base, file, tmp_path / f"o{len(starts)}", train={"max_steps": 1, "batch_size": 2},
                          initializer={"method": "corda", "mode": "kpm", **extra})
        graft = run(document).grafts[0]
        starts.append(next(iter(graft.adapters.values())).lora_A0.detach().clone())
    assert not torch.allclose(starts[0], starts[1], rtol=1e-2)
    plans = {start: graftwork.plan({**document, "initializer": start}, estimate_time=False) for start in ("pissa", "corda")}
    assert plans["corda"].peak_bytes == plans["pissa"].peak_bytes and not plans["corda"].notes
    assert plans["corda"].categories["adapters"] == 2 * sum(p.numel() * 4 for p in graft.parameters())


def test_the_example_recipe_is_one():
    from pathlib import Path

    path = Path(__file__).parents[2] / "examples" / "recipes" / "corda.yaml"
    assert graftwork.recipe.load_recipe(path).initializer.mode == yaml.safe_load(path.read_text())["initializer"]["mode"]


def test_refusals():
    with pytest.raises(UsageError, match="needs data"):
        graftwork.attach(tiny.llama(), "lora", initializer="corda")
    with pytest.raises(UsageError, match="experts"):
        started(tiny.mixtral(), targets="all-linear")
    with pytest.raises(UsageError, match="takes 40 components"):
        started(r=40, targets=["v_proj"])
    with pytest.raises(UsageError, match="saw no input"):
        graftwork.attach(tiny.llama(), "lora", initializer="corda", batches=iter([]))

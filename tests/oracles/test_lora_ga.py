"""LoRA-GA: the gradient pass equals autograd's, the first step is the best low-rank copy of the full one, exact export."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import graftwork
import tiny
from adapter_support import close, fill, output
from graftwork.errors import UsageError
from graftwork.modeling.protocols import is_conv1d
from graftwork.registry import lookup, make_config
from training_support import completions, folder, recipe, run

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "k_proj", "down_proj"]


def loaded(tmp_path, kind, storage):
    """A tiny model from a folder, so that it can be stored in any format and saved grafts can be attached to it."""
    folder = tmp_path / kind
    if not folder.exists():
        tiny.save(tiny.ALL[kind](), folder)
    return graftwork.load(folder, storage=storage, dtype="fp32")[0]


def batches(n=3):
    for seed in range(n):
        ids = tiny.tokens(3, 12, seed)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def full_gradients(model, names, n=3):
    """Mean gradient of whole weights by autograd, (out, in)."""
    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    losses = [model(**batch).loss for batch in batches(n)]
    grads = torch.autograd.grad(torch.stack(losses).mean(), weights)
    return {name: g.T if is_conv1d(model.get_submodule(name)) else g for name, g in zip(names, grads, strict=True)}


def start(model, r=4, targets=TARGETS, n=3, alpha=None, name="default", seed=0, rslora=False, **options):
    return graftwork.attach(model, "lora", r=r, alpha=alpha, target_modules=targets, batches=batches(n), seed=seed, name=name,
                            use_rslora=rslora, initializer={"method": "lora_ga", **options})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_gradient_pass_is_autograd(kind):
    model = tiny.ALL[kind]().train()
    graft = graftwork.attach(model, "lora", r=2)
    names = list(graft.adapters)
    fill(graft)  # another graft is off during the pass, and gets no gradient
    info = lookup("initializer", "lora_ga")
    made = info.cls(make_config("initializer", "lora_ga", batches=2))
    found = made.statistics(model, list(graft.sites.values()), graft.config, batches())
    assert all(p.grad is None for p in model.parameters()) and model.training
    wanted = full_gradients(tiny.ALL[kind](), names, 2)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@torch.no_grad()
def test_the_first_step_is_the_best_approximation_of_the_full_one(direction):
    model = tiny.llama()
    with torch.enable_grad():
        gradients = full_gradients(tiny.llama(), [f"model.layers.{i}.{m}" for i in (0, 1) for m in (
            "self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")])
    graft = start(model, direction=direction, scale="unit", niter=12)
    with torch.enable_grad():
        torch.stack([model(**b).loss for b in batches()]).mean().backward()
    for name, adapter in graft.adapters.items():
        G, r = gradients[name].double(), adapter.r
        B0, A0 = adapter.lora_B.double(), adapter.lora_A.double()
        U, S, Vh = torch.linalg.svd(G)
        best = U[:, : 2 * r] * S[: 2 * r] @ Vh[: 2 * r]
        torch.testing.assert_close(A0 @ A0.T, torch.eye(r).double(), atol=1e-5, rtol=0)
        if direction != "random":  # each of the leading directions is used once, by A or by B
            close(B0 @ B0.T @ G + G @ A0.T @ A0, best, 1e-4)
        lr = 1e-4  # small: the second-order term lr^2 dB dA vanishes beside the first
        step = (adapter.lora_B - lr * adapter.lora_B.grad).double() @ (adapter.lora_A - lr * adapter.lora_A.grad).double() - B0 @ A0
        cosine = float(-(step * best).sum() / step.norm() / best.norm())
        assert cosine > (0.999 if direction != "random" else 0.5), (name, cosine)


@torch.no_grad()
def test_it_follows_the_full_step_better_than_a_random_start():
    cosines = {}
    for kind in ("lora_ga", "default"):
        model = tiny.llama()
        graft = start(model) if kind == "lora_ga" else graftwork.attach(model, "lora", r=4, target_modules=TARGETS)
        with torch.enable_grad():
            gradients = full_gradients(tiny.llama(), list(graft.adapters))
            torch.stack([model(**b).loss for b in batches()]).mean().backward()
        dots = []
        for name, adapter in graft.adapters.items():
            B, A = adapter.lora_B, adapter.lora_A
            step = -(B.grad @ A + B @ A.grad)
            dots.append(float(-(step * gradients[name]).sum() / step.norm() / gradients[name].norm()))
        cosines[kind] = min(dots)
    assert cosines["lora_ga"] > cosines["default"] + 0.2, cosines


@torch.no_grad()
def test_scales():
    model = tiny.llama()
    sizes = {}
    for scale in ("unit", "stable", "gd", "weight"):
        graft = start(model, alpha=8.0, scale=scale, name=scale)
        sizes[scale] = graft.adapters["model.layers.0.self_attn.k_proj"].lora_A.norm(dim=1).mean()
    sizes["gamma"] = start(model, alpha=8.0, gamma=4.0, name="g").adapters["model.layers.0.self_attn.k_proj"].lora_A.norm(dim=1).mean()
    W = model.model.layers[0].self_attn.k_proj.weight
    top = (torch.linalg.svdvals(W)[:4] / 2.0).sqrt().mean()
    expected = {"unit": 1.0, "stable": 32**0.25 / 4, "gd": 0.5, "weight": float(top), "gamma": 32**0.25 / 2}
    for name, value in expected.items():
        assert float(sizes[name]) == pytest.approx(value, rel=2e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_start_export_and_file(kind, storage, tmp_path):
    model = loaded(tmp_path, kind, storage)
    before = output(model, IDS)
    graft = start(model, targets="all-linear", rslora=True, alpha=5.0)
    close(output(model, IDS), before, 1e-5)
    again = start(loaded(tmp_path, kind, storage), targets="all-linear", rslora=True, alpha=5.0, name="x")
    assert all(torch.equal(adapter.lora_A, graft.adapters[name].lora_A) for name, adapter in again.adapters.items())
    fill(graft, size=0.02)
    learned = output(model, IDS)
    pairs, error = graft.to_lora()
    assert error == 0 and all(A.shape[0] == 8 for _, A in pairs.values())
    fresh = loaded(tmp_path, kind, storage)
    for name, (B, A) in pairs.items():
        site = graft.sites[name]
        W = site.product.dense().float() + B @ A
        x = torch.randn(3, site.in_features)
        base = graft.base_of(site)
        close(graft.adapters[name](x, base), x @ W.T + (0 if base.bias is None else base.bias), 1e-5)
    graft.save(tmp_path / "saved")
    graftwork.attach_saved(fresh, tmp_path / "saved")
    assert torch.equal(output(fresh, IDS), learned)


def test_batches_counts_and_refusals():
    read = []

    def counted():
        for batch in batches(9):
            read.append(1)
            yield batch

    graftwork.attach(tiny.llama(), "lora", r=2, batches=counted(), initializer={"method": "lora_ga", "batches": 2})
    assert 2 <= len(read) <= 3
    one = start(tiny.llama(), batches=1).adapters["model.layers.0.self_attn.k_proj"].lora_A
    assert not torch.allclose(one, start(tiny.llama(), batches=3).adapters["model.layers.0.self_attn.k_proj"].lora_A)
    rough = start(tiny.llama(), r=6, niter=0).adapters["model.layers.0.self_attn.k_proj"].lora_A
    assert not torch.equal(rough, start(tiny.llama(), r=6, niter=4).adapters["model.layers.0.self_attn.k_proj"].lora_A)
    with pytest.raises(UsageError, match="needs data"):
        graftwork.attach(tiny.llama(), "lora", initializer="lora_ga")
    with pytest.raises(UsageError, match="no batch"):
        graftwork.attach(tiny.llama(), "lora", initializer="lora_ga", batches=[])
    with pytest.raises(UsageError, match="takes 34 ranks.*32 x 64"):
        start(tiny.llama(), r=17)
    with pytest.raises(UsageError, match="fused experts"):
        graftwork.attach(tiny.mixtral(), "lora", r=2, batches=batches(), initializer="lora_ga")
    with pytest.raises(UsageError, match="no finite loss"):
        bad = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in batches(1)]
        graftwork.attach(tiny.llama(), "lora", r=2, batches=bad, initializer="lora_ga")


@pytest.mark.slow
def test_a_recipe_plans_and_runs(tmp_path):
    base, data = folder(tmp_path), completions(tmp_path / "d.jsonl")
    documents = [recipe(base, data, tmp_path / name, initializer=start, storage="nf4") for name, start in
                 (("plain", "default"), ("ga", {"method": "lora_ga", "batches": 2}))]
    plans = [graftwork.plan(document, estimate_time=False) for document in documents]
    assert plans[1].categories["adapters"] == 2 * plans[0].categories["adapters"] and plans[1].trained == plans[0].trained
    done = run(documents[1])
    assert all(a.lora_A0 is not None for a in done.grafts[0].adapters.values()) and done.loss > 0


def test_plan():
    info = lookup("initializer", "lora_ga")
    with FakeTensorMode():
        graft = graftwork.attach(tiny.llama(), "lora", r=4)
        plain = sum(p.nbytes for _, p in graft.named_parameters(trainable=False))
        info.cls(info.config()).plan_extra(graft)
        assert sum(p.nbytes for _, p in graft.named_parameters(trainable=False)) == 2 * plain

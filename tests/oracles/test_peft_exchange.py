"""PEFT as the other side: what we write computes the same there, what it writes computes the same here."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import graftwork
import tiny
from graftwork.artifact import graft_tensors
from graftwork.errors import ArtifactError, IncompatibleError, UsageError
from graftwork.interchange.peft import TEMPLATE, read_config, write_peft
from graftwork.interchange.peft_export import target_names


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def fill(parameters, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def ours(model, method, **options):
    graft = graftwork.attach(model, method, **options)
    fill(graft.parameters())
    return graft


def through_peft(model, folder):
    """The model with the folder attached by PEFT; any key that PEFT misses or does not expect fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.utils.warning.PeftWarning)
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*lora_bias=True.*")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


WRITTEN = {
    "lora": ("llama", "lora", dict(r=4, alpha=6.0)),
    "rslora": ("llama", "lora", dict(r=4, alpha=6.0, use_rslora=True, target_modules="attention")),
    "patterns": ("llama", "lora", dict(r=4, alpha=8, rank_pattern={r"layers\.1\..*q_proj": 2, "up_proj": 7},
                                       alpha_pattern={"q_proj": 3.0, r"layers\.0\.mlp\.down_proj": 11})),
    "alpha of each rank": ("llama", "lora", dict(r=4, rank_pattern={"v_proj": 1}, target_modules=["v_proj", "o_proj"])),
    "bias": ("gpt2", "lora", dict(r=2, bias="lora_only", target_modules="all-linear")),
    "bias where none was": ("llama", "lora", dict(r=2, alpha=3, bias="lora_only", target_modules=["v_proj"])),
    "Conv1D": ("gpt2", "lora", dict(r=3, alpha=2)),
    "slices of c_attn": ("gpt2", "lora", dict(r=3, alpha=2, target_modules="q,v")),
    "Qwen3": ("qwen3", "lora", dict(r=3, target_modules="mlp")),
    "experts": ("mixtral", "lora", dict(r=2, alpha=5)),
    "PaCA": ("llama", "paca", dict(r=5, alpha=10.0)),
    "NOLA": ("qwen3", "nola", dict(r=2, n_basis=4, target_modules=["q_proj", "v_proj"])),
    "PaCA on Conv1D": ("gpt2", "paca", dict(r=2)),
}


@pytest.mark.parametrize("style", ["exact", "baked"])
@pytest.mark.parametrize("case", WRITTEN)
def test_logits_through_peft_are_ours(case, style, tmp_path):
    kind, method, options = WRITTEN[case]
    build = tiny.CAUSAL[kind]
    model = build()
    base = logits(model)
    graft = ours(model, method, **options)
    wanted = logits(model)
    if style == "baked" and "bias" in case:
        with pytest.raises(IncompatibleError, match="biases"):
            write_peft(graft, tmp_path / "x", style=style)
        assert not (tmp_path / "x").exists()
        return
    report = write_peft(graft, tmp_path / "x", style=style)
    assert report["error"] == 0.0
    assert (wanted - base).abs().max() > 0.1
    torch.testing.assert_close(logits(through_peft(build(), tmp_path / "x")), wanted, atol=1e-5, rtol=1e-5)
    other = build()
    graftwork.attach_saved(other, tmp_path / "x")
    torch.testing.assert_close(logits(other), wanted, atol=1e-5, rtol=1e-5)


def test_exact_style_keeps_the_tensors_and_a_baked_one_is_uniform(tmp_path):
    model = tiny.llama()
    _, _, options = WRITTEN["patterns"]
    graft = ours(model, "lora", **options)
    write_peft(graft, tmp_path / "exact")
    write_peft(graft, tmp_path / "baked", style="baked")
    other = tiny.llama()
    again = graftwork.attach_saved(other, tmp_path / "exact")
    before, after = graft_tensors(graft), graft_tensors(again)
    assert sorted(before) == sorted(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert {n: a.scale for n, a in again.adapters.items()} == {n: a.scale for n, a in graft.adapters.items()}
    assert torch.equal(logits(other), logits(model))
    config = json.loads((tmp_path / "baked" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (7, 7, {}, {})
    assert not config["use_rslora"] and config["target_modules"] == sorted(config["target_modules"])
    ranks = {t.shape[0] for k, t in load_file(tmp_path / "baked" / "adapter_model.safetensors").items() if "lora_A" in k}
    assert ranks == {7}


@pytest.mark.parametrize("style", ["exact", "baked"])
def test_pissa_becomes_rank_2r_on_the_pristine_base(style, tmp_path):
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", r=3, alpha=6, initializer="pissa", target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    wanted = logits(model)
    assert write_peft(graft, tmp_path / "x", style=style)["rank"] == 6
    torch.testing.assert_close(logits(through_peft(tiny.llama(), tmp_path / "x")), wanted, atol=2e-5, rtol=1e-5)


def test_a_pair_in_the_storage_is_exported_with_it(tmp_path):
    """QPiSSA's storage holds Q(W - B0 A0); on the pristine base the pair must be subtracted."""
    model = tiny.llama()
    graft = ours(model, "lora", r=2, target_modules=["v_proj"])
    for adapter in graft.adapters.values():
        adapter.set_pair(torch.randn(adapter.out_features, 2) * 0.1, torch.randn(2, adapter.in_features), in_storage=False)
    wanted = logits(model)
    for adapter in graft.adapters.values():
        adapter.pair_in_storage = True
    write_peft(graft, tmp_path / "x")
    torch.testing.assert_close(logits(through_peft(tiny.llama(), tmp_path / "x")), wanted, atol=1e-5, rtol=1e-5)


def test_weight_of_the_graft_counts(tmp_path):
    model = tiny.llama()
    graft = ours(model, "lora", r=2, alpha=3)
    graft.scale(0.25)
    wanted = logits(model)
    for style in ("exact", "baked"):
        write_peft(graft, tmp_path / style, style=style)
        torch.testing.assert_close(logits(through_peft(tiny.llama(), tmp_path / style)), wanted, atol=1e-5, rtol=1e-5)


def test_multiplicative_needs_a_rank_and_reports_the_error(tmp_path):
    model = tiny.llama()
    graft = ours(model, "flora", r=1, target_modules=["v_proj"])
    with pytest.raises(UsageError, match="not low-rank") as caught:
        write_peft(graft, tmp_path / "x")
    assert "--rank" in caught.value.remedy
    errors = [write_peft(graft, tmp_path / f"x{rank}", rank=rank)["error"] for rank in (4, 16, 32)]
    assert errors[0] > errors[1] > 0.01 and errors[2] < 1e-5
    exact = graft.delta_weights()["model.layers.0.self_attn.v_proj"]
    tensors = load_file(tmp_path / "x16" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    found = tensors[key.format("B")] @ tensors[key.format("A")]
    U, S, Vh = torch.linalg.svd(exact.double())
    torch.testing.assert_close(found.double(), (U[:, :16] * S[:16]) @ Vh[:16], atol=1e-5, rtol=1e-4)


def test_rank_cuts_a_lora_by_its_own_svd(tmp_path):
    model = tiny.llama()
    graft = ours(model, "lora", r=6, alpha=9, target_modules=["q_proj"])
    report = write_peft(graft, tmp_path / "x", rank=2)
    lost = total = 0.0
    for change in graft.delta_weights().values():
        S = torch.linalg.svdvals(change.double())
        lost, total = lost + float((S[2:] ** 2).sum()), total + float((S**2).sum())
    assert report["rank"] == 2 and abs(report["error"] - (lost / total) ** 0.5) < 1e-5


def test_classification_head_goes_along(tmp_path):
    def scores(model):
        with torch.no_grad():
            return model(tiny.tokens()).logits

    model = tiny.bert_classifier()
    graft = ours(model, "lora", r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    wanted = scores(model)
    write_peft(graft, tmp_path / "x")
    torch.testing.assert_close(scores(through_peft(tiny.bert_classifier(), tmp_path / "x")), wanted, atol=1e-5, rtol=1e-5)
    other = tiny.bert_classifier()
    graftwork.attach_saved(other, tmp_path / "x")
    torch.testing.assert_close(scores(other), wanted, atol=1e-6, rtol=1e-6)
    with pytest.raises(IncompatibleError, match="whole modules"):
        write_peft(graft, tmp_path / "y", style="baked")


def test_config_has_exactly_pefts_keys(tmp_path):
    graft = ours(tiny.llama(), "lora", r=2)
    write_peft(graft, tmp_path / "x")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    written = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert sorted(written) == sorted(theirs)
    own = ("target_modules", "base_model_name_or_path", "r", "lora_alpha", "task_type")
    same = {k: v for k, v in theirs.items() if k not in own}
    assert {k: TEMPLATE[k] for k in same} == same


def test_targets_match_exactly_the_sites():
    model = tiny.bert()
    names = {n for n, _ in model.named_modules()}
    some = {"encoder.layer.0.output.dense", "encoder.layer.1.output.dense", "encoder.layer.0.attention.self.query",
            "encoder.layer.1.attention.self.query"}
    for wanted in (some, {"encoder.layer.0.attention.self.query"}, {n for n in names if n.endswith("query")}):
        target = target_names(model, wanted)
        config = peft.LoraConfig(target_modules=target)
        found = {n for n in names if n and peft.tuners.tuners_utils.check_target_module_exists(config, n)}
        assert found == wanted
    assert target_names(model, {n for n in names if n.endswith("query")}) == ["query"]


# -- the other way ----------------------------------------------------------------------------------------------------------
READ = {
    "plain": ("llama", dict(r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"])),
    "all-linear": ("llama", dict(r=2, target_modules="all-linear")),
    "regex": ("llama", dict(r=2, target_modules=r".*\.[01]\.self_attn\.(q|v)_proj")),
    "rslora, patterns": ("llama", dict(r=4, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"],
                                       rank_pattern={"layers.0.self_attn.q_proj": 2, "^model.layers.1.mlp.up_proj": 6},
                                       alpha_pattern={"v_proj": 3, ".*up_proj": 5})),
    "layers": ("llama", dict(r=2, target_modules=["q_proj"], layers_to_transform=[1])),
    "exclude list": ("llama", dict(r=2, target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.q_proj"])),
    "exclude regex": ("llama", dict(r=2, target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.0\..*q_proj")),
    "bias": ("gpt2", dict(r=2, target_modules=["c_attn", "c_fc"], bias="lora_only", fan_in_fan_out=True)),
    "lora_bias": ("gpt2", dict(r=2, lora_alpha=6, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)),
    "head": ("qwen3", dict(r=2, target_modules=["q_proj", "lm_head"])),
    "saved head": ("qwen3", dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "experts": ("mixtral", dict(r=2, lora_alpha=4, target_modules=["q_proj"],
                                target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                                rank_pattern={r".*\.experts\.down_proj": 3})),
    "one expert map": ("mixtral", dict(r=2, target_modules=["k_proj"], target_parameters=["experts.down_proj"])),
}


@pytest.mark.parametrize("case", READ)
def test_adapters_written_by_peft_attach_here(case, tmp_path):
    kind, options = READ[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.CAUSAL[kind](), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        fill([p for n, p in theirs.named_parameters() if p.requires_grad])
        theirs.save_pretrained(tmp_path / "x")
    wanted = logits(theirs)
    model = tiny.CAUSAL[kind]()
    base = logits(model)
    graft = graftwork.attach_saved(model, tmp_path / "x")
    assert (wanted - base).abs().max() > 0.05
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    graft.detach()
    assert torch.equal(logits(model), base)


def _folder(tmp_path, **options):
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
    fill([p for p in theirs.parameters() if p.requires_grad])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "x")
    return tmp_path / "x"


REFUSED = {
    "DoRA's bias": (dict(use_dora=True, bias="lora_only"), "bias='lora_only' with 'dora'"),
    "PiSSA's own base": (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "OLoRA's own base": (dict(init_lora_weights="olora"), "olora"),
    "all biases": (dict(bias="all"), "bias='all'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graft_cannot_express_is_refused_by_name(case, tmp_path):
    options, words = REFUSED[case]
    folder = _folder(tmp_path, **options)
    for read in (lambda: read_config(folder), lambda: graftwork.attach_saved(tiny.llama(), folder)):
        with pytest.raises(ArtifactError, match=words) as caught:
            read()
        assert caught.value.remedy


def test_other_methods_of_peft_and_pickles_are_refused(tmp_path):
    theirs = peft.get_peft_model(tiny.llama(), peft.HRAConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "hra")
    with pytest.raises(ArtifactError, match="HRA adapter; ADALORA, IA3"):
        graftwork.attach_saved(tiny.llama(), tmp_path / "hra")
    folder = _folder(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="pickle"):
        graftwork.attach_saved(tiny.llama(), folder)


ATTENTION = "base_model.model.model.layers.0.self_attn"
DAMAGE = {
    "missing": (lambda t: t.pop(f"{ATTENTION}.q_proj.lora_B.weight"), "missing tensor"),
    "unexpected": (lambda t: t.update({f"{ATTENTION}.k_proj.lora_A.weight": torch.ones(2, 64)}), "unexpected tensor"),
    "shape": (lambda t: t.update({f"{ATTENTION}.q_proj.lora_A.weight": torch.ones(5, 64)}), "expected"),
    "nan": (lambda t: t[f"{ATTENTION}.q_proj.lora_A.weight"].fill_(float("nan")), "NaN"),
    "zero": (lambda t: [v.zero_() for v in t.values()], "zero everywhere"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders_are_errors_and_leave_the_model_alone(kind, tmp_path):
    from safetensors.torch import save_file

    folder = _folder(tmp_path)
    damage, words = DAMAGE[kind]
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    model = tiny.llama()
    with pytest.raises(ArtifactError, match=words):
        graftwork.attach_saved(model, folder)
    assert not any("graft" in n.split(".") for n, _ in model.named_modules())

"""Merged folders, LoRA artifacts, mlx folders, and the verbs merge and convert."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import graftwork
import tiny
from graftwork.errors import GraftworkError, IncompatibleError, UsageError
from graftwork.interchange.merged import write_merged
from graftwork.modeling.models import load_model


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def fill(graft, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return graft


def ours(model, method, **options):
    return fill(graftwork.attach(model, method, **options))


def reload(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


# -- merged -----------------------------------------------------------------------------------------------------------------
MERGED = {
    "llama": ("llama", "lora", dict(r=3, alpha=5)), "gpt2 bias": ("gpt2", "lora", dict(r=2, bias="lora_only")),
    "gpt2 slices": ("gpt2", "lora", dict(r=2, bias="lora_only", target_modules="k,v")), "paca": ("qwen3", "paca", dict(r=3)),
    "experts": ("mixtral", "lora", dict(r=2)), "flora": ("llama", "flora", dict(r=2)),
    "saved head": ("qwen3", "lora", dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tied head": ("llama", "lora", dict(r=2, target_modules=["q_proj", "lm_head"])),
}


@pytest.mark.parametrize("case", MERGED)
def test_merged_folder_reloads_to_equal_logits(case, tmp_path):
    kind, method, options = MERGED[case]
    model = tiny.CAUSAL[kind]()
    graft = ours(model, method, **options)
    wanted = logits(model)
    report = write_merged(graft, tmp_path / "m", tokenizer=tiny.tokenizer())
    assert torch.equal(logits(model), wanted)  # the live model is as it was
    again = reload(tmp_path / "m")
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)
    assert set(report.errors) == set(graft.adapters) and report.worst < 1e-5
    assert again.config.tie_word_embeddings == (kind in ("llama", "gpt2") and case != "tied head")
    assert (tmp_path / "m" / "tokenizer.json").exists() and (tmp_path / "m" / "generation_config.json").exists()


def test_merged_files_are_those_of_save_pretrained(tmp_path):
    """Names, fusions and values as Transformers writes them (per-expert tensors of a Mixtral)."""
    model = tiny.mixtral()
    graft = ours(model, "lora", r=2, target_modules=["q_proj"])
    write_merged(graft, tmp_path / "m")
    graft.merge()
    graft_free = {k: v for k, v in model.state_dict().items() if ".graft." not in k}
    plain = tiny.mixtral()
    plain.load_state_dict(graft_free)
    plain.save_pretrained(tmp_path / "theirs")
    mine, theirs = load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert sorted(mine) == sorted(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_shards_and_dtype(tmp_path):
    model = tiny.llama()
    graft = ours(model, "lora", r=2)
    report = write_merged(graft, tmp_path / "m", dtype="bf16", shard_bytes=60_000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "m" / "model.safetensors.index.json").exists()
    again = reload(tmp_path / "m")
    assert next(again.parameters()).dtype == torch.bfloat16
    name = "model.layers.0.self_attn.q_proj"
    exact = model.get_submodule(name).weight + graft.delta_weights()[name]
    assert torch.equal(again.get_submodule(name).weight, exact.bfloat16())
    lost = (exact.bfloat16().float() - exact).norm() / graft.delta_weights()[name].norm()
    assert abs(report.errors[name] - float(lost)) < 1e-6 and report.worst > 1e-4


@pytest.fixture
def quantized(tmp_path):
    """(model on NF4 with a graft, folder of its base, with a licence)"""
    folder = tiny.save(tiny.llama(), tmp_path / "base")
    (folder / "LICENSE").write_text("licence of the base")
    model, tokenizer = graftwork.load(folder, storage="nf4")
    return model, tokenizer, folder


def test_quantized_base_merges_into_what_it_was_trained_on(quantized, tmp_path):
    model, tokenizer, folder = quantized
    graft = ours(model, "lora", r=2, target_modules=["q_proj", "up_proj"])
    write_merged(graft, tmp_path / "trained", tokenizer=tokenizer)
    write_merged(graft, tmp_path / "pristine", base="pristine")
    assert (tmp_path / "trained" / "LICENSE").read_text() == "licence of the base"
    torch.testing.assert_close(logits(reload(tmp_path / "trained")), logits(model), atol=1e-5, rtol=1e-5)
    dense, _ = load_model(folder)
    second = ours(dense, "lora", r=2, target_modules=["q_proj", "up_proj"])
    assert all(torch.equal(a.lora_B, graft.adapters[n].lora_B) for n, a in second.adapters.items())
    torch.testing.assert_close(logits(reload(tmp_path / "pristine")), logits(dense), atol=1e-5, rtol=1e-5)
    assert (logits(dense) - logits(model)).abs().max() > 1e-2


def test_flora_on_pristine_weights_masks_those(quantized, tmp_path):
    model, _, folder = quantized
    graft = ours(model, "flora", r=1, target_modules=["v_proj"])
    write_merged(graft, tmp_path / "m", base="pristine")
    dense, _ = load_model(folder)
    other = graftwork.attach(dense, "flora", r=1, target_modules=["v_proj"])
    for name, adapter in other.adapters.items():
        adapter.load_state_dict(graft.adapters[name].state_dict())
    torch.testing.assert_close(logits(reload(tmp_path / "m")), logits(dense), atol=1e-5, rtol=1e-5)


def test_qpissa_merges_on_both_bases(quantized, tmp_path):
    model, _, folder = quantized
    graft = graftwork.attach(model, "lora", r=2, initializer="pissa", target_modules=["q_proj"])
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    write_merged(graft, tmp_path / "trained")
    torch.testing.assert_close(logits(reload(tmp_path / "trained")), logits(model), atol=1e-5, rtol=1e-5)
    write_merged(graft, tmp_path / "pristine", base="pristine")
    again = reload(tmp_path / "pristine")
    dense, _ = load_model(folder)
    for name, adapter in graft.adapters.items():
        start, now = adapter.lora_B0 @ adapter.lora_A0, adapter.scale * adapter.lora_B @ adapter.lora_A
        exact = dense.get_submodule(name).weight - start + now
        torch.testing.assert_close(again.get_submodule(name).weight, exact, atol=1e-5, rtol=1e-5)


def test_requantize_is_refused_where_it_destroys_the_change(quantized, tmp_path):
    model, _, _ = quantized
    graft = fill(graftwork.attach(model, "lora", r=2, target_modules=["q_proj"]), size=0.01)
    with pytest.raises(GraftworkError, match="would lose"):
        write_merged(graft, tmp_path / "m", requantize=True)
    assert not (tmp_path / "m").exists()
    report = write_merged(graft, tmp_path / "m", requantize=True, force=True)
    assert report.worst > 0.5 and report.target == "requantized"
    again = graftwork.load(tmp_path / "m", storage="nf4")[0]
    dense = reload(tmp_path / "m")
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(again.get_submodule(name).dequantize(), dense.get_submodule(name).weight, atol=2e-3, rtol=1e-2)
    with pytest.raises(UsageError):
        write_merged(graft, tmp_path / "n", requantize=True, base="pristine")


def test_what_cannot_be_merged_is_refused(tmp_path):
    model = tiny.llama()
    graft = ours(model, "lora", r=2, bias="lora_only", target_modules=["q_proj"])
    with pytest.raises(IncompatibleError, match="no bias"):
        write_merged(graft, tmp_path / "m")
    with pytest.raises(GraftworkError, match="no files"):
        write_merged(ours(tiny.llama(), "lora", r=2), tmp_path / "m", base="pristine")
    merged = ours(tiny.llama(), "lora", r=2)
    merged.merge()
    with pytest.raises(UsageError, match="is merged"):
        write_merged(merged, tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(GraftworkError, match="exists already"):
        write_merged(ours(tiny.llama(), "lora", r=2), tmp_path / "full")
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["full"]'

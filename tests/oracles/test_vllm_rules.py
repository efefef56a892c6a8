"""What `convert --to vllm` writes, read by vLLM's documented rules: a reader of our own, since vLLM itself does not run here.

Its rules for an adapter folder: adapter_config.json with r, lora_alpha and target_modules (names, no expression); patterns are
ignored; bias, modules_to_save and DoRA are refused; the scale is lora_alpha / r, with use_rslora lora_alpha / sqrt(r). Tensors are
named base_model.model.MODULE.lora_A.weight (r, in) and .lora_B.weight (out, r), in pairs, of modules that it packs or replaces."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import adapter_support as support
import tiny
from graftwork.errors import IncompatibleError
from graftwork.interchange.peft_export import write_peft

PREFIX = "base_model.model."
#: modules of a Llama or Qwen decoder that take LoRA there (q, k, v and gate, up are packed by it)
KNOWN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def read(folder, max_lora_rank=16):
    """{module: its change (out, in) in float64}. Raises ValueError for what the rules refuse."""
    config = json.loads((folder / "adapter_config.json").read_text())
    r, targets = config["r"], config["target_modules"]
    if r > max_lora_rank:
        raise ValueError(f"rank {r} above --max-lora-rank {max_lora_rank}")
    if config.get("bias", "none") != "none" or config.get("modules_to_save") or config.get("use_dora"):
        raise ValueError("bias, modules_to_save or DoRA")
    if config.get("trainable_token_indices") or config.get("target_parameters"):
        raise ValueError("rows of tokens, or parameters of experts")
    if isinstance(targets, str) or not {name.split(".")[-1] for name in targets} <= KNOWN:
        raise ValueError(f"unexpected modules {targets}")
    scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
    factors = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        parts = key.removeprefix(PREFIX).split(".")
        if not key.startswith(PREFIX) or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise ValueError(f"unsupported LoRA weight {key}")
        if parts[-3] not in KNOWN:
            raise ValueError(f"unexpected module in {key}")
        if value.shape[0 if parts[-2] == "lora_A" else 1] != r:
            raise ValueError(f"{key} is not of rank {r}")
        factors.setdefault(".".join(parts[:-2]), {})[parts[-2]] = value.double()
    return {module: scale * pair["lora_B"] @ pair["lora_A"] for module, pair in factors.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("method, options", [
    ("lora", {"r": 3, "alpha": 7, "use_rslora": True, "rank_pattern": {"q_proj": 5, "up_proj": 1}, "alpha_pattern": {"v_proj": 1}}),
    ("lora", {"r": 2, "initializer": "pissa"}), ("lora", {"r": 2, "target_modules": ["q_proj", "down_proj"]}),
    ("paca", {"r": 3}), ("nola", {"r": 2}), ("kasa", {"r": 2}), ("lora_xs", {"r": 2}), ("vera", {"r": 4}), ("mos", {}),
])
@pytest.mark.slow
def test_it_reads_the_change_that_was_learned(kind, method, options, tmp_path):
    graft = support.attach(tiny.CAUSAL[kind](), method, **options)
    wanted = {graft.sites[name].module_name: value.double() for name, value in graft.delta_weights().items()}
    write_peft(graft, tmp_path / "x", style="baked")
    found = read(tmp_path / "x", max_lora_rank=32)
    assert set(found) == set(wanted)
    for module, change in wanted.items():
        torch.testing.assert_close(found[module], change, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("style, options", [
    ("exact", {"r": 3, "rank_pattern": {"q_proj": 5}}), ("baked", {"r": 40}),
    ("exact", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})])
def test_what_it_would_refuse_or_misread_is_seen(style, options, tmp_path):
    write_peft(support.attach(tiny.llama(), "lora", **options), tmp_path / "x", style=style)
    with pytest.raises(ValueError):
        read(tmp_path / "x")


@pytest.mark.parametrize("options", [{"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
                                     {"r": 2, "trainable_tokens": [3]}])
def test_what_it_cannot_hold_is_not_written(options, tmp_path):
    graft = support.attach(tiny.llama(), "lora", **options)
    with pytest.raises(IncompatibleError, match="vLLM"):
        write_peft(graft, tmp_path / "x", style="baked")
    assert not (tmp_path / "x").exists()

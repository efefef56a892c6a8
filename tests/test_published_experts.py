"""Experts of published quantised checkpoints: maps packed one by one from each format's specification, against the float64 model."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftwork
import tiny
from graftwork.errors import ModelError, UsageError
from graftwork.modeling.fingerprint import fingerprint
from graftwork.modeling.models import load_model
from graftwork.registry import lookup
from graftwork.storage import Storage
from graftwork.storage.base import dense_state
from published_support import (
    GROUP,
    awq_module,
    float8_module,
    float8_tensor_module,
    gptq_module,
    int8_module,
    mxfp4_module,
    nf4_module,
    of_form,
    packed_document,
    packed_module,
)

EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(\w+)\.weight$")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
#: as gpt-oss itself says it
GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                                               "lm_head"]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
       "bnb_4bit_compute_dtype": "float32"}


def moved(rows, columns, seed):
    """Maps with the same inputs have the same order of columns: gate and up of every expert."""
    return gptq_module(rows, columns, seed, bits=3, act_order=True, order=columns)


def float_form():
    return of_form(packed_document(8, True, "channel"), "float-quantized", type="float")


#: model, document, what packs a map, the storage, bits a weight of gate and up of an expert (of down where they are one map)
KINDS = {
    "gpt-oss mxfp4": (tiny.gpt_oss, GPT_OSS, mxfp4_module, "fp4", 4.25),
    "qwen3_moe fp8": (tiny.qwen3_moe, {"quant_method": "fp8", "weight_block_size": [16, 32]}, lambda *a: fp8_of(16, 32, *a), "fp8",
                      8 + 32 / 512),
    "deepseek fp8, blocks cut": (lambda: tiny.deepseek_v3(moe_intermediate_size=160), {"quant_method": "fp8", "weight_block_size": [128, 128]},
                                 lambda *a: float8_module(*a, block=128), "fp8", 8 + 32 / (32 * 64)),
    "mixtral gptq": (tiny.mixtral, GPTQ, gptq_module, "int4", 5.5),
    "mixtral gptq 3 bits act-order": (tiny.mixtral, {**GPTQ, "bits": 3, "desc_act": True}, moved, "int3", 3 + 1.5 + 32 / 192),
    "qwen3_moe gptq_v2 8 bits": (tiny.qwen3_moe, {**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"},
                                 lambda *a: gptq_module(*a, bits=8, second=True), "int8", 12.0),
    "qwen3_moe awq": (tiny.qwen3_moe, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
                      awq_module, "int4", 5.5),
    "deepseek pack-quantized": (tiny.deepseek_v3, packed_document(4, False, actorder="group"),
                                lambda *a: packed_module(*a, symmetric=False, act_order=True), "int4", 5.5 + 32 / 192),
    "mixtral int-quantized": (tiny.mixtral, of_form(packed_document(8, True, "channel"), "int-quantized"), int8_module, "int8", 9.0),
    "mixtral float-quantized": (tiny.mixtral, float_form(), lambda *a: float8_module(*a, block=None), "fp8", 8.25),
    "mixtral float-quantized, a scale a matrix": (tiny.mixtral, of_form(packed_document(8, True, "tensor"), "float-quantized", type="float"),
                                                  float8_tensor_module, "fp8", 8 + 16 / (96 * 64)),
    "mixtral bitsandbytes": (tiny.mixtral, NF4, nf4_module, "nf4", 4.5),
}


def fp8_of(high, wide, rows, columns, seed):
    """Blocks that are not square."""
    tensors, values = float8_module(rows, columns, seed, block=1)
    scale = tensors["weight_scale_inv"][: -(-rows // high), : -(-columns // wide)].contiguous()
    units = values / tensors["weight_scale_inv"].double()
    wide_scale = scale.double().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return {"weight": tensors["weight"], "weight_scale_inv": scale}, units * wide_scale


def publish(folder, model, document, pack, *, dense=lambda name: False):
    """A folder whose linear maps (experts alone under MXFP4) are packed; returns the dense float64 model of the packed values, put
    together by Transformers from files of its own, and {map in the file: its packed tensors}. dense(name): maps that stay as they are."""
    from transformers import AutoModelForCausalLM

    tiny.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    values, packed = {}, {}
    for seed, name in enumerate(sorted(tensors)):
        module = name.removesuffix(".weight")
        if document["quant_method"] == "mxfp4":
            if name.endswith((".gate_up_proj", ".down_proj")):
                count, columns, rows = tensors[name].shape
                made = [pack(rows, columns, 100 * seed + expert) for expert in range(count)]
                packed[name] = {leaf: torch.stack([each[leaf] for each, _ in made]) for leaf in made[0][0]}
                values[name] = torch.stack([value for _, value in made]).mT.contiguous()
        elif name.endswith("_proj.weight") or "proj_with_mqa.weight" in name or name.endswith("b_proj.weight") or EXPERT.match(name):
            if not dense(module):
                packed[module], values[name] = pack(*tensors[name].shape, seed)
    twin = folder / "twin"
    tiny.save(model, twin)
    save_file({name: values.get(name, value).double() for name, value in tensors.items()}, twin / "model.safetensors",
              metadata={"format": "pt"})
    join = "_" if document["quant_method"] == "mxfp4" else "."
    coded = {f"{module}{join}{leaf}": value.contiguous() for module, each in packed.items() for leaf, value in each.items()}
    save_file({**{n: v for n, v in tensors.items() if n not in values}, **coded}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": document}))
    return AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float64, experts_implementation="eager",
                                                attn_implementation="eager").eval(), packed


def stores(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Storage)}


def experts_of(model):
    return {name: module for name, module in stores(model).items() if ".experts." in name}


def change(folder, edit):
    """edit(tensors) -> the tensors of the folder's file."""
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_experts_keep_their_codes_train_an_adapter_and_are_planned(kind, tmp_path):
    build, document, pack, method, bits = KINDS[kind]
    exact, packed = publish(tmp_path, build(), document, pack)
    loaded, _ = graftwork.load(tmp_path)
    mine, ids = experts_of(loaded), tiny.tokens()
    blocks = 1 if "deepseek" in kind else 2
    assert len(mine) == blocks * 2 * 4 and loaded.graft_storage.method == method
    for name, module in mine.items():
        parameter, _, expert = name.rpartition(".")
        wanted = exact.get_parameter(parameter)[int(expert)]
        wanted = wanted.T if "gpt-oss" in kind else wanted
        assert type(module).method == method and module.bias is None
        assert torch.equal(module.dequantize(), wanted.float())  # the values in float64, rounded once
        assert parameter not in loaded.graft_source
    first = mine[f"model.layers.1.mlp.experts.{'down_proj' if bits == 12.0 else 'gate_up_proj'}.3"]
    assert first.bits_per_weight == pytest.approx(bits, abs=1e-12)
    if method == "fp4":
        kept = packed["model.layers.1.mlp.experts.gate_up_proj"]
        assert torch.equal(first.leaves()["codes"], kept["blocks"][3].flatten(1)) and torch.equal(first.leaves()["scale"], kept["scales"][3])
        assert not stores(loaded).keys() - mine.keys()  # attention and router are dense
    if method == "fp8" and "mixtral" not in kind:
        both = [packed[f"model.layers.1.mlp.experts.3.{part}_proj"]["weight"].view(torch.uint8) for part in ("gate", "up")]
        assert torch.equal(first.leaves()["codes"], torch.cat(both))
    with torch.no_grad():
        expected = exact(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits.double(), expected, atol=2e-4, rtol=2e-4)
    fake, _ = load_model(tmp_path, fake=True)
    assert {n: (p.shape, p.dtype) for n, p in fake.named_parameters()} == {n: (p.shape, p.dtype) for n, p in loaded.named_parameters()}
    assert fingerprint(loaded) == fingerprint(load_model(tmp_path, dtype="bf16")[0])
    before = {(name, leaf): value.clone() for name, module in stores(loaded).items() for leaf, value in module.leaves().items()}
    graft = graftwork.attach(loaded, "lora", name="a", r=2)
    assert sum(site.expert is not None for site in graft.sites.values()) == len(mine)
    learned = [p for p in loaded.parameters() if p.requires_grad]
    step, losses = torch.optim.SGD(learned, 0.1), []
    for _ in range(4):
        loss = loaded(input_ids=ids, labels=ids).loss
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(adapter.lora_B.abs().max() > 0 for name, adapter in graft.adapters.items() if graft.sites[name].expert is not None)
    for (name, leaf), value in before.items():
        assert torch.equal(stores(loaded)[name].leaves()[leaf].view(torch.uint8), value.view(torch.uint8))

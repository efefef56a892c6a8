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
from graftwork.storage.published import storage_of_checkpoint
from published_support import (
    GPTQ,
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
#: as gpt-oss itself says it
GPT_OSS = {"quant_method": "mxfp4",
           "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
       "bnb_4bit_compute_dtype": "float32"}


def moved(rows, columns, seed):
    """Maps with the same inputs have the same order of columns: gate and up of every expert."""
    return gptq_module(rows, columns, seed, bits=3, act_order=True, order=columns)


def float_form(strategy="channel"):
    return of_form(packed_document(8, True, strategy), "float-quantized", type="float")


#: model, document, what packs a map, the storage, bits a weight of gate and up of an expert (of down where they are one map)
KINDS = {
    "gpt-oss mxfp4": (tiny.gpt_oss, GPT_OSS, mxfp4_module, "fp4", 4.25),
    "qwen3_moe fp8": (tiny.qwen3_moe, {"quant_method": "fp8", "weight_block_size": [16, 32]}, lambda *a: fp8_of(16, 32, *a), "fp8",
                      8 + 32 / 512),
    "deepseek fp8, blocks cut": (lambda: tiny.deepseek_v3(moe_intermediate_size=160),
                                 {"quant_method": "fp8", "weight_block_size": [128, 128]},
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
    "mixtral float-quantized, a scale a matrix": (tiny.mixtral, float_form("tensor"), float8_tensor_module, "fp8", 8 + 16 / (96 * 64)),
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
        assert torch.equal(first.leaves()["codes"], kept["blocks"][3].flatten(1))
        assert torch.equal(first.leaves()["scale"], kept["scales"][3])
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


def test_one_storage_of_two_maps():
    def parts(pack, document, *seeds, rows=(32, 32)):
        made = [pack(size, 64, seed) for size, seed in zip(rows, seeds)]
        cls = lookup("storage", storage_of_checkpoint(document)[0]).cls
        return cls, [cls.from_checkpoint(tensors, document) for tensors, _ in made], torch.cat([value for _, value in made])

    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    cls, both, values = parts(lambda *a: float8_module(*a, block=128), block, 1, 2, rows=(192, 160))
    joined = cls.joined(both)
    assert joined.options.block_rows == 64 and torch.equal(joined.float().dequantize(), values.float())
    cls, both, values = parts(moved, {**GPTQ, "bits": 3, "desc_act": True}, 1, 2)
    assert torch.equal(cls.joined(both).float().dequantize(), values.float()) and "group_index" in cls.joined(both).leaves()
    cls, other, _ = parts(lambda *a: gptq_module(*a, bits=3, act_order=True), {**GPTQ, "bits": 3, "desc_act": True}, 1, 2)
    with pytest.raises(UsageError, match="differ in 'group_index'"):
        cls.joined(other)
    _, straight, _ = parts(lambda *a: gptq_module(*a, bits=3), {**GPTQ, "bits": 3}, 3, 4)
    with pytest.raises(UsageError, match="different orders"):
        cls.joined([both[0], straight[0]])
    cls, both, values = parts(nf4_module, NF4, 1, 2)
    assert torch.equal(cls.joined(both).float().dequantize(), values.float())  # 32 x 64 x 2 weights are 64 scales, of two offsets
    with pytest.raises(UsageError, match="in different ways"):
        cls.joined([both[0], cls.from_weight(values[:32].float(), both[0].options.model_copy(update={"double_quant": False}))])
    with pytest.raises(UsageError, match="does not put maps together"):
        lookup("storage", "vptq").cls.joined(both)


@pytest.mark.slow
def test_plans_saved_adapters_merges_and_sizes_from_the_config_alone(tmp_path):
    from graftwork.interchange.merged import write_merged
    from graftwork.interchange.opening import open_saved
    from graftwork.planning.simulate import plan
    from graftwork.training.run import train_recipe

    data, ids = tmp_path / "rows.jsonl", tiny.tokens()
    data.write_text("".join(json.dumps({"prompt": "the answer is", "completion": f" {i}"}) + "\n" for i in range(8)))
    for number, kind in enumerate(("gpt-oss mxfp4", "deepseek fp8, blocks cut")):
        folder, run = tmp_path / f"m{number}", tmp_path / f"run{number}"
        build, document, pack, *_ = KINDS[kind]
        publish(folder, build(), document, pack)
        recipe = {"model": str(folder), "adapter": {"method": "lora", "r": 2, "bias": "lora_only" if number == 0 else "none"},
                  "optimizer": {"method": "adamw", "lr": 0.05}, "data": {"train": str(data), "max_length": 32},
                  "train": {"max_steps": 2, "batch_size": 2, "precision": "fp32"}, "output_dir": str(run)}
        loaded, _ = load_model(folder)
        kept = sum(p.numel() * p.itemsize for p in (*loaded.parameters(), *loaded.buffers()))
        assert plan(recipe, estimate_time=False).categories["weights"] == kept
        alone = tmp_path / f"config{number}"
        alone.mkdir()
        (alone / "config.json").write_text((folder / "config.json").read_text())
        told, _ = load_model(alone / "config.json", fake=True)
        if number == 0:  # blocks are cut where the parts meet, which config.json does not tell
            assert {n: p.shape for n, p in told.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
        assert stores(told).keys() == stores(loaded).keys()
        train_recipe(recipe, quiet=True)
        model, _, graft = open_saved(run / "graft")
        with torch.no_grad():
            trained, base = model(input_ids=ids).logits, loaded(input_ids=ids).logits
            assert (trained - base).abs().max() > 1e-3
            write_merged(graft, tmp_path / f"merged{number}")
            again, _ = load_model(tmp_path / f"merged{number}")
            assert not stores(again)
            torch.testing.assert_close(again(input_ids=ids).logits, trained, atol=2e-4, rtol=2e-4)
            before = {name: dict(module.leaves()) for name, module in experts_of(model).items()}
            graft.merge()
            torch.testing.assert_close(model(input_ids=ids).logits, trained, atol=2e-4, rtol=2e-4)
            graft.unmerge()
            assert all(torch.equal(leaf, before[name][key]) for name, module in experts_of(model).items()
                       for key, leaf in module.leaves().items())
            dense = type(model)._from_config(model.config).eval()
            assert not dense.load_state_dict(dense_state(loaded), strict=False).unexpected_keys
            torch.testing.assert_close(dense(input_ids=ids).logits, base, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
def test_experts_that_stayed_dense_in_a_folder_of_codes(tmp_path):
    exact, _ = publish(tmp_path, tiny.mixtral(), GPTQ, gptq_module, dense=lambda name: "experts" in name)
    loaded, _ = graftwork.load(tmp_path)
    assert not experts_of(loaded) and len(stores(loaded)) == 8
    assert loaded.get_parameter("model.layers.0.mlp.experts.gate_up_proj").shape == (4, 192, 64)
    ids = tiny.tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits.double(), exact(input_ids=ids).logits, atol=2e-4, rtol=2e-4)
    fake, _ = load_model(tmp_path, fake=True)
    assert {n: (p.shape, p.dtype) for n, p in fake.named_parameters()} == {n: (p.shape, p.dtype) for n, p in loaded.named_parameters()}


@pytest.mark.slow
def test_damaged_and_missing_experts(tmp_path):
    def without(*endings):
        return lambda tensors: {n: v for n, v in tensors.items() if not n.endswith(endings)}

    def cut(ending, edit):
        return lambda tensors: {n: edit(v).contiguous() if n.endswith(ending) else v for n, v in tensors.items()}

    def renamed(tensors):
        return {n.replace("experts.3.", "experts.4."): v for n, v in tensors.items()}

    cases = {
        "qwen3_moe fp8": [
            (without("layers.1.mlp.experts.2.up_proj.weight", "layers.1.mlp.experts.2.up_proj.weight_scale_inv"),
             "lack expert 2 of 'model.layers.1.mlp.experts.gate_up_proj', or a part of it"),
            (without("layers.1.mlp.experts.2.up_proj.weight_scale_inv"), "gate_up_proj.2': .*'weight_scale_inv' of a module is missing"),
            (without("_proj.weight_scale_inv"), "scales are missing"),
            (cut("experts.0.down_proj.weight", lambda v: v[:, :32]), "down_proj.0': .*do not fit a weight of 64 x 32"),
            (cut("experts.0.gate_proj.weight", lambda v: v.view(torch.uint8)), "gate_up_proj.0': .*not E4M3"),
            (renamed, "is of expert 4, and 'model.layers.0.mlp.experts.*has 4")],
        "gpt-oss mxfp4": [
            (without("layers.1.mlp.experts.down_proj_scales"), "down_proj.0': .*'scales' of a module is missing"),
            (without("layers.1.mlp.experts.down_proj_blocks", "layers.1.mlp.experts.down_proj_scales"),
             "lacks 1 weights of GptOssForCausalLM: model.layers.1.mlp.experts.down_proj"),
            (without("layers.0.mlp.experts.gate_up_proj_bias"), "lacks 1 weights .*gate_up_proj_bias"),
            (cut("layers.0.mlp.experts.gate_up_proj_blocks", lambda v: v[:3]), "and the model 4 experts"),
            (cut("layers.0.mlp.experts.gate_up_proj_blocks", lambda v: v[:, :64]), "gate_up_proj.0': .*are no MXFP4 matrix"),
            (cut("layers.0.mlp.experts.gate_up_proj_scales", lambda v: torch.full_like(v, 255)), "gate_up_proj.0': .*a scale is NaN")],
    }
    for kind, edits in cases.items():
        build, document, pack, *_ = KINDS[kind]
        folder = tmp_path / kind.split()[0]
        publish(folder, build(), document, pack)
        whole = (folder / "model.safetensors").read_bytes()
        for edit, message in edits:
            change(folder, edit)
            with pytest.raises(ModelError, match=message):
                load_model(folder)
            (folder / "model.safetensors").write_bytes(whole)
        load_model(folder)
    publish(tmp_path / "m", tiny.mixtral(), {**GPTQ, "desc_act": True}, lambda *a: gptq_module(*a, act_order=True))
    with pytest.raises(UsageError, match="gate_up_proj.0': maps that the model keeps as one differ in 'group_index'"):
        load_model(tmp_path / "m")

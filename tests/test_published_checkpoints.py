"""Published quantised checkpoints: fixtures packed here, code by code, from each format's specification, against float64 values."""

import json

import pytest
import torch

import graftwork
import tiny
from graftwork.errors import ModelError, UsageError
from graftwork.modeling.fingerprint import fingerprint
from graftwork.modeling.models import load_model
from graftwork.registry import lookup, methods
from graftwork.storage import Storage
from graftwork.storage.published import read, storage_of_checkpoint
from published_support import (
    EVEN_MORE,
    GPTQ,
    GROUP,
    IN,
    OUT,
    awq_module,
    drawn,
    float8,
    float8_module,
    gptq_module,
    int8_module,
    mxfp4_module,
    of_form,
    packed_document,
    packed_module,
    per_column,
    scales,
    words,
)

FORMATS = {info.name for info in methods("storage")}


def made(document, tensors):
    name, config = storage_of_checkpoint(document)
    stored = lookup("storage", name).cls.from_checkpoint(tensors, document)
    assert type(stored).method == name and stored.options.group_size == config.group_size
    counted = sum(p.numel() * p.element_size() for n, p in stored.named_parameters() if n != "bias")
    assert stored.bits_per_weight == 8 * counted / (stored.out_features * stored.in_features)
    return stored


def check(stored, expected, dtype):
    """expected: float64; in fp32 the values are its nearest, in the checkpoint's dtype they are rounded once."""
    assert stored.compute_dtype == dtype and torch.equal(stored.dequantize(), expected.float().to(dtype))
    assert torch.equal(stored.float().dequantize(), expected.float())
    x = torch.randn(3, expected.shape[1], generator=torch.Generator().manual_seed(5))
    bias = 0 if stored.bias is None else stored.bias.double()
    torch.testing.assert_close(stored(x).double(), x.double() @ expected.T + bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(bits, form, act_order):
    codes, zeros = drawn(2**bits, OUT, IN), drawn(2**bits, OUT, IN // GROUP, seed=2)
    zeros[0, 0] = 0  # kept as 2^b - 1 in the first format
    scale, index = scales(OUT, IN // GROUP), torch.arange(IN) // GROUP
    if act_order:
        index = index[torch.randperm(IN, generator=torch.Generator().manual_seed(3))]
    kept = zeros if form == "gptq_v2" else (zeros - 1) % 2**bits
    tensors = {"qweight": words(codes, bits).T.contiguous(), "qzeros": words(kept.T, bits), "scales": scale.T.contiguous(),
               "g_idx": index.to(torch.int32), "bias": scales(OUT, seed=4)}
    document = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order, "checkpoint_format": form}
    if bits == 8 and act_order:
        with pytest.raises(UsageError, match="act-order"):
            made(document, tensors)
        return
    stored = made(document, tensors)
    check(stored, (codes - per_column(zeros, index)) * per_column(scale, index), torch.float16)
    assert ("group_index" in stored.leaves()) == act_order
    if act_order:
        assert stored.bits_per_weight == bits + 24 / GROUP + 32 / OUT
        rounds_inputs_as_in_order(stored, index)


def rounds_inputs_as_in_order(stored, index):
    """Products of rounded inputs, scales with gradients and shifts know that a group's columns do not lie together."""
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(6))
    stored.options = stored.options.model_copy(update={"activations": "int8"})
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / step).round() * step).double() @ stored.dequantize().double().T
    torch.testing.assert_close(stored.product(x).double(), expected, atol=1e-3, rtol=1e-4)
    stored.options = stored.options.model_copy(update={"activations": "none"})
    own = stored.leaves()
    scale = own["scale"].float().requires_grad_()
    (grad,) = torch.autograd.grad(stored.product(x, {"scale": scale}).sum(), scale)
    units = stored.dequantize().double() / per_column(own["scale"], index)
    wanted = torch.zeros(OUT, IN // GROUP, dtype=torch.float64).index_add_(1, index, units * x.double().sum(0))
    torch.testing.assert_close(grad.double(), wanted, atol=1e-2, rtol=1e-4)
    assert stored.shifted(torch.ones(OUT, IN)) is None and "group_index" in stored.with_leaves({"scale": scale}).leaves()


def test_gptq_of_whole_rows_and_what_does_not_fit():
    codes, zeros, scale = drawn(16, OUT, IN), torch.full((OUT, 1), 8), scales(OUT, 1)
    tensors = {"qweight": words(codes, 4).T.contiguous(), "qzeros": words(zeros.T - 1, 4), "scales": scale.T.contiguous()}
    document = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    check(made(document, tensors), (codes - 8).double() * scale.double(), torch.float16)
    with pytest.raises(ModelError, match="in groups of 16"):
        made({**document, "group_size": 16}, tensors)
    with pytest.raises(ModelError, match="qzeros"):
        made(document, {k: v for k, v in tensors.items() if k != "qzeros"})
    for wrong in ({"bits": 5}, {"checkpoint_format": "marlin"}):
        with pytest.raises(UsageError, match="GPTQ of"):
            storage_of_checkpoint({**document, **wrong})
    with pytest.raises(UsageError, match="is not what this published"):
        read("int3", tensors, document)
    for method in ("int4", "int8", "gguf"):
        with pytest.raises(UsageError, match="published"):
            lookup("storage", method).cls.from_checkpoint(tensors)


def test_awq():
    codes, zeros, scale = drawn(16, OUT, IN), drawn(16, OUT, IN // GROUP, seed=2), scales(OUT, IN // GROUP)
    order, index = (0, 2, 4, 6, 1, 3, 5, 7), torch.arange(IN) // GROUP
    tensors = {"qweight": words(codes.T, 4, order), "qzeros": words(zeros.T, 4, order), "scales": scale.T.contiguous()}
    document = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True,
                "modules_to_not_convert": ["gate"]}
    check(made(document, tensors), (codes - per_column(zeros, index)) * per_column(scale, index), torch.float16)
    assert "gate" in storage_of_checkpoint(document)[1].skip_modules
    with pytest.raises(UsageError, match="gemv"):
        storage_of_checkpoint({**document, "version": "gemv"})


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_tensors_packed(bits, symmetric, dtype):
    half = 2 ** (bits - 1)
    codes, scale = drawn(2**bits, OUT, IN) - half, scales(OUT, IN // GROUP, dtype=dtype)
    zeros = drawn(2**bits, OUT, IN // GROUP, seed=2) - half
    index = torch.arange(IN) // GROUP
    tensors = {"weight_packed": words(codes + half, bits), "weight_scale": scale, "weight_shape": torch.tensor([OUT, IN])}
    if not symmetric:
        tensors["weight_zero_point"] = words((zeros + half).T, bits).T.contiguous()
    expected = (codes - per_column(zeros * (not symmetric), index)) * per_column(scale, index)
    check(made(packed_document(bits, symmetric), tensors), expected, torch.bfloat16)


def test_compressed_tensors_channels_act_order_and_int8():
    codes, scale = drawn(16, OUT, IN), scales(OUT, 1, dtype=torch.bfloat16)
    tensors = {"weight_packed": words(codes, 4), "weight_scale": scale, "weight_shape": torch.tensor([OUT, IN])}
    check(made(packed_document(4, True, "channel"), tensors), (codes - 8) * scale.double(), torch.bfloat16)
    index = (torch.arange(IN) // GROUP).flip(0)
    scale = scales(OUT, IN // GROUP, dtype=torch.bfloat16)
    stored = made(packed_document(4, True), {**tensors, "weight_scale": scale, "weight_g_idx": index.int()})
    check(stored, (codes - 8) * per_column(scale, index), torch.bfloat16)
    signed, rows = (drawn(255, OUT, IN) - 127).to(torch.int8), scales(OUT, 1, dtype=torch.float32)
    document = packed_document(8, True, "channel")
    document["format"] = "int-quantized"
    check(lookup("storage", "int8").cls.from_checkpoint({"weight": signed, "weight_scale": rows}, document),
          signed.double() * rows.double(), torch.bfloat16)
    assert "router" in storage_of_checkpoint(document)[1].skip_modules
    for wrong in (packed_document(3, True), packed_document(4, True, "tensor"), {**EVEN_MORE, "config_groups": {}},
                  {**packed_document(4, True), "format": "marlin-24"}, {"quant_method": "aqlm"}):
        with pytest.raises(UsageError, match="published quantized checkpoint"):
            storage_of_checkpoint(wrong)
    with pytest.raises(ModelError, match="do not fit"):
        made(packed_document(4, False), tensors)


def test_bitsandbytes_is_sent_to_nf4():
    document = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                "llm_int8_skip_modules": ["lm_head", "router"]}
    name, config = storage_of_checkpoint(document)
    assert name == "nf4" and config.double_quant and config.skip_modules[-1] == "router"
    with pytest.raises(ModelError, match="not an NF4"):
        read("nf4", {"weight": torch.zeros(2, 2)}, document)
    for wrong in ({"bnb_4bit_quant_type": "fp4"}, {"load_in_4bit": False}):
        with pytest.raises(UsageError, match="not NF4"):
            storage_of_checkpoint({**document, **wrong})


@pytest.mark.skipif("fp8" not in FORMATS, reason="there is no fp8 storage")
def test_fp8_blocks_channels_and_whole_matrices():
    weight, values = float8(200, 150)
    scale = scales(2, 2, dtype=torch.float32)
    wide = scale.double().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :150]
    document = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    check(made(document, {"weight": weight, "weight_scale_inv": scale}), values * wide, torch.bfloat16)
    powers = torch.tensor([[120, 127], [130, 125]], dtype=torch.uint8)
    stored = made(document, {"weight": weight, "weight_scale_inv": powers.view(torch.float8_e8m0fnu)})
    wide = 2.0 ** (powers.double() - 127).repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :150]
    check(stored, values * wide, torch.bfloat16)
    with pytest.raises(ModelError, match="do not fit"):
        made(document, {"weight": weight, "weight_scale_inv": scale[:, :1]})
    for strategy, shape in (("channel", (200, 1)), ("tensor", (1,))):
        form = packed_document(8, True, strategy)
        form["format"], form["config_groups"]["group_0"]["weights"]["type"] = "float-quantized", "float"
        scale = scales(*shape, dtype=torch.bfloat16)
        check(made(form, {"weight": weight, "weight_scale": scale}), values * scale.double().reshape(-1, 1), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif("fp4" not in FORMATS, reason="there is no fp4 storage")
def test_mxfp4():
    book = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    book = torch.tensor([*book, *(-v for v in book)], dtype=torch.float64)
    codes, powers = drawn(16, OUT, IN), drawn(20, OUT, IN // 32, seed=2) + 115
    blocks = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8).view(OUT, IN // 32, 16)
    expected = book[codes] * per_column(2.0 ** (powers.double() - 127), torch.arange(IN) // 32)
    document = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    stored = made(document, {"blocks": blocks, "scales": powers.to(torch.uint8), "bias": scales(OUT, dtype=torch.bfloat16)})
    check(stored, expected, torch.bfloat16)
    assert stored.bits_per_weight == 4.25
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    public = _convert_moe_packed_tensors(blocks[None], powers[None].to(torch.uint8), dtype=torch.float32)
    assert torch.equal(public.reshape(-1).sort().values, expected.float().reshape(-1).sort().values)
    with pytest.raises(ModelError, match="no MXFP4 matrix"):
        made(document, {"blocks": blocks, "scales": powers.to(torch.uint8).T})


# -- whole folders ---------------------------------------------------------------------------------------------------------------
#: a document, what packs a module, the storage, bits a weight of a module of 96 x 64
FOLDERS = {
    "gptq": (GPTQ, gptq_module, "int4", 5.5),
    "gptq 3 bits act-order": ({**GPTQ, "bits": 3, "desc_act": True}, lambda *a: gptq_module(*a, bits=3, act_order=True), "int3",
                              3 + 1.5 + 32 / 96),
    "gptq_v2 8 bits": ({**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, lambda *a: gptq_module(*a, bits=8, second=True), "int8", 12.0),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq_module, "int4", 5.5),
    "pack-quantized": (packed_document(4, True), packed_module, "int4", 5.0),
    "pack-quantized asymmetric act-order": (packed_document(4, False, actorder="group"),
                                            lambda *a: packed_module(*a, symmetric=False, act_order=True), "int4", 5.5 + 32 / 96),
    "int-quantized": (of_form(packed_document(8, True, "channel"), "int-quantized"), int8_module, "int8", 9.0),
    "float-quantized": (of_form(packed_document(8, True, "channel"), "float-quantized", type="float"),
                        lambda *a: float8_module(*a, block=None), "fp8", 8.25),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, float8_module, "fp8", 8 + 32 / 1024),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4_module, "fp4", 4.25),
}


def published_folder(folder, document, pack, model=None):
    """A tiny Llama whose maps are packed by `pack`; its dense twin."""
    from safetensors.torch import save_file

    model = model or tiny.llama()
    tiny.save(model, folder)
    tensors = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, weight = pack(*module.weight.shape, seed)
            with torch.no_grad():
                module.weight.copy_(weight)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{leaf}": value for leaf, value in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": document}))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_loads_with_its_codes_trains_an_adapter_and_is_planned(kind, tmp_path):
    document, pack, method, bits = FOLDERS[kind]
    model = published_folder(tmp_path, document, pack)
    loaded, tokenizer = graftwork.load(tmp_path)
    assert tokenizer is not None and loaded.graft_storage.method == method
    stored = {name: module for name, module in loaded.named_modules() if isinstance(module, Storage)}
    assert len(stored) == 14 and stored["model.layers.1.mlp.up_proj"].bits_per_weight == bits
    for name, module in stored.items():
        assert type(module).method == method and module.bias is None and torch.equal(module.dequantize(), model.get_submodule(name).weight)
        assert f"{name}.weight" not in loaded.graft_source  # what has that name in the file is codes
    ids = tiny.tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)  # sums in another order
    fake, _ = load_model(tmp_path, fake=True)
    assert {n: (p.shape, p.dtype) for n, p in fake.named_parameters()} == {n: (p.shape, p.dtype) for n, p in loaded.named_parameters()}
    assert fingerprint(loaded) == fingerprint(load_model(tmp_path, dtype="bf16")[0])
    before = {(name, leaf): value.clone() for name, module in stored.items() for leaf, value in module.leaves().items()}
    graftwork.attach(loaded, "lora", name="a", r=2)
    learned = [p for p in loaded.parameters() if p.requires_grad]
    step = torch.optim.SGD(learned, 0.1)
    losses = []
    for _ in range(3):
        loss = loaded(input_ids=ids, labels=ids).loss
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    for (name, leaf), value in before.items():
        assert torch.equal(stored[name].leaves()[leaf].view(torch.uint8), value.view(torch.uint8))


@pytest.mark.slow
def test_plans_adapters_and_refusals_of_published_folders(tmp_path):
    from graftwork.interchange.opening import open_saved
    from graftwork.planning.simulate import plan
    from graftwork.training.run import train_recipe

    document, pack, *_ = FOLDERS["gptq 3 bits act-order"]
    published_folder(tmp_path / "m", document, pack)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "the answer is", "completion": f" {i}"}) + "\n" for i in range(8)))
    recipe = {"model": str(tmp_path / "m"), "adapter": {"method": "peqa"}, "data": {"train": str(data), "max_length": 32},
              "train": {"max_steps": 2, "batch_size": 2, "precision": "fp32"}, "output_dir": str(tmp_path / "run")}
    loaded, _ = load_model(tmp_path / "m")
    kept = sum(p.numel() * p.itemsize for p in (*loaded.parameters(), *loaded.buffers()))
    assert plan(recipe, estimate_time=False).categories["weights"] == kept
    train_recipe(recipe, quiet=True)
    model, _, graft = open_saved(tmp_path / "run" / "graft")
    change = graft.adapters["model.layers.0.mlp.up_proj"].scale_change
    assert change.shape == (96, 4) and (change != 0).any()
    ids = tiny.tokens()
    with torch.no_grad():
        trained, base = model(input_ids=ids).logits, loaded(input_ids=ids).logits
        report = graft.merge()  # new scales beside the same codes
        assert max(report.errors.values()) < 1e-5 and not torch.allclose(trained, base)
        torch.testing.assert_close(model(input_ids=ids).logits, trained, atol=1e-4, rtol=1e-4)
    for wrong, words_ in (({**document, "bits": 5}, "gptq.*5 bits"), ({"quant_method": "aqlm"}, "quantised already .aqlm"),
                          ({**document, "group_size": 32}, "groups of 32")):
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": wrong}))
        with pytest.raises(ModelError, match=words_):
            load_model(tmp_path / "m")

    def biased(rows, columns, seed):
        tensors, weight = gptq_module(rows, columns, seed)
        return {**tensors, "bias": torch.ones(rows, dtype=torch.float16)}, weight

    def scrambled(rows, columns, seed):
        tensors, weight = gptq_module(rows, columns, seed)
        return {**tensors, "g_idx": tensors["g_idx"] + 1}, weight

    for number, (made_, words_) in enumerate(((biased, "bias in the checkpoint"), (scrambled, "columns are of groups 1 to"))):
        published_folder(tmp_path / str(number), GPTQ, made_)
        with pytest.raises(ModelError, match=words_):
            load_model(tmp_path / str(number))
    published_folder(tmp_path / "e", GPTQ, gptq_module, tiny.mixtral())
    from safetensors.torch import load_file, save_file

    whole = load_file(tmp_path / "e" / "model.safetensors")
    save_file({n: v for n, v in whole.items() if "experts" not in n}, tmp_path / "e" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 5 weights of MixtralForCausalLM: .*layers.0.mlp.experts"):
        load_model(tmp_path / "e")

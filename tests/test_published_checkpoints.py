"""Published quantised checkpoints: fixtures packed here, code by code, from each format's specification, against float64 values."""

import pytest
import torch

from graftwork.errors import ModelError, UsageError
from graftwork.registry import lookup, methods
from graftwork.storage.published import read, storage_of_checkpoint

FORMATS = {info.name for info in methods("storage")}
OUT, IN, GROUP = 16, 64, 16
EVEN_MORE = {"quant_method": "compressed-tensors", "ignore": ["lm_head", "model.layers.0.mlp.router"]}


def drawn(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape, dtype=torch.float16, seed=1):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01).to(dtype)


def words(codes, bits, order=None):
    """Rows of codes as int32 words: bit k of the row's stream of bits is bit k % 32 of word k // 32, code by code from its lowest bit."""
    found = []
    for row in codes.tolist():
        if order is not None:
            row = [row[8 * (i // 8) + order[i % 8]] for i in range(len(row))]
        total = sum(code << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        parts = [(total >> (32 * k)) & 0xFFFFFFFF for k in range(count)]
        found.append([part - 2**32 if part >= 2**31 else part for part in parts])
    return torch.tensor(found, dtype=torch.int32)


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


def per_column(values, index):
    """(out, groups) -> (out, in)."""
    return values[:, index].double()


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


def packed_document(bits, symmetric, strategy="group", **more):
    return {**EVEN_MORE, "format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": GROUP if strategy == "group" else None,
        **more}}}}


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


def float8(*shape):
    """All finite E4M3 numbers in turn, and their values by the definition of the type."""
    finite = [code for code in range(256) if code & 127 != 127]
    codes = torch.tensor(finite).repeat(-(-shape[0] * shape[1] // 254))[: shape[0] * shape[1]].view(shape)
    values = []
    for code in codes.flatten().tolist():
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(-size if code >= 128 else size)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), torch.tensor(values, dtype=torch.float64).view(shape)


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

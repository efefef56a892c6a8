"""Rounded inputs: sums of a group in int64, the whole product in float64, torch's E4M3 casts; gradients straight through."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny
from adapter_support import attach, close, output
from graftwork.errors import UsageError
from graftwork.registry import lookup, make_config
from graftwork.storage import _tiles, apply_storage
from graftwork.storage._activations import TOP, group_sums, rounded
from graftwork.storage.base import make_storage

FORMATS = [("int4", {}), ("int4", {"symmetric": True}), ("int4", {"zero_point": "float"}), ("int3", {}), ("int2", {}), ("fp4", {}),
           ("fp4", {"scale": "e4m3"}), ("fp8", {}), ("fp8", {"block_rows": 4}), ("bitmod", {"scale": "int8"}), ("olive", {})]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight, method, **options):
    return make_storage(weight, method, make_config("storage", method, **{"group_size": 32, **options}))


def by_definition(x, kind):
    """x (..., in) float64 -> what is multiplied, float64."""
    scale = x.abs().amax(-1, keepdim=True) / TOP[kind]
    scale = torch.where(scale == 0, 1.0, scale)
    return ((x / scale).to(torch.float8_e4m3fn).double() if kind == "fp8" else (x / scale).round()) * scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("columns", [96, 70])
def test_products_of_whole_numbers_are_exact(symmetric, kind, columns, monkeypatch):
    """With powers of two for scales nothing is rounded after the inputs: equal to integers in float64, bit for bit."""
    monkeypatch.setattr(_tiles, "TILE", 200)
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-7, 8, (9, columns), generator=generator)
    integers[:, ::32], integers[:, 1::32] = 7, -8 + symmetric  # so that a group's scale is the power of two
    weight = integers * 2.0 ** torch.randint(-3, 4, (9, 1), generator=generator)
    codes = torch.randint(-int(TOP[kind]), int(TOP[kind]) + 1, (2, 3, columns), generator=generator)
    codes[..., 5] = int(TOP[kind])
    x = codes * 2.0 ** torch.randint(-3, 4, (2, 3, 1), generator=generator)
    stored = kept(weight, "int4", symmetric=symmetric, activations=kind)
    assert torch.equal(stored.dequantize(), weight)
    assert torch.equal(stored(x).double(), x.double() @ weight.double().T)


def test_sums_within_a_group_equal_int64_also_in_long_groups():
    generator = torch.Generator().manual_seed(0)
    for group in (64, 20000):  # 20000 * 127 * 15 is above 2^24
        units = torch.randint(100, 128, (3, group), generator=generator)
        integers = torch.randint(10, 16, (4, 1, group), generator=generator)
        found = group_sums(units.float(), integers.float(), torch.ones(4, 1))
        assert torch.equal(found, (units @ integers[:, 0].T).float())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_format_of_groups(method, options, kind):
    stored = kept(weight := normal(12, 70), method, activations=kind, **options)
    plain = kept(weight, method, **options)
    x = normal(2, 5, 70, seed=1)
    x[0, 0] = 0
    x.requires_grad_()
    y, dense = stored(x), plain.dequantize().double()
    expected = by_definition(x.detach().double(), kind) @ dense.T
    assert torch.equal(stored.dequantize(), plain.dequantize()) and stored.bits_per_weight == plain.bits_per_weight
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5 if kind == "int8" else 5e-3)
    torch.testing.assert_close(stored(x, stored.leaves()).double(), expected, rtol=2e-5, atol=2e-5 if kind == "int8" else 5e-3)
    assert not torch.allclose(y, plain(x), atol=1e-4)
    (gradient,) = torch.autograd.grad(y, x, upstream := normal(2, 5, 12, seed=2))
    torch.testing.assert_close(gradient.double(), upstream.double() @ dense, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(stored(x, stored.leaves()), x, upstream)
    torch.testing.assert_close(gradient.double(), upstream.double() @ dense, rtol=1e-4, atol=1e-5)


def test_an_input_scale_divides_first_and_lower_precision_works():
    stored = kept(weight := normal(12, 64), "int4", activations="int8")
    scale = normal(64, seed=3).exp().half()
    leaves = {**stored.leaves(), "input_scale": scale}
    scaled = type(stored)(12, 64, stored.options, leaves, None, torch.float32)
    x = normal(4, 64, seed=1)
    expected = by_definition(x.double() / scale.double(), "int8") @ stored.dequantize().double().T
    torch.testing.assert_close(scaled(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled(x, scaled.leaves()).double(), expected, rtol=1e-5, atol=1e-4)
    low = kept(weight.bfloat16(), "int4", activations="int8")
    y = low(x.bfloat16())
    expected = F.linear(x, low.dequantize().float())
    assert y.dtype == torch.bfloat16 and (y.float() - expected).norm() < 0.03 * expected.norm()


def test_one_outlier_harms_eight_bit_integers_more_than_floats():
    x = normal(16, 256)
    x[:, 3] *= 100
    error = {kind: float((by_definition(x.double(), kind) - x).norm()) for kind in TOP}
    found = {kind: float((units * scale - x).norm()) for kind in TOP for units, scale in [rounded(x, kind)]}
    assert found == pytest.approx(error, rel=1e-3)
    small = {kind: float(((units * scale - x)[:, 4:]).norm()) for kind in TOP for units, scale in [rounded(x, kind)]}
    assert small["fp8"] < small["int8"] < small["int4"]


@pytest.mark.slow
def test_models_plans_and_adapters():
    """An adapter beside such a layer gets the inputs as they are, and trains; fake tensors go through."""
    config = make_config("storage", "int4", activations="int8")
    model, plain = apply_storage(tiny.llama(), config), apply_storage(tiny.llama(), lookup("storage", "int4").config())
    ids = tiny.tokens()
    with torch.no_grad():
        got, reference = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert 0 < (got - reference).norm() < 0.1 * reference.norm()
    layer = model.model.layers[0].self_attn.q_proj
    graft = attach(model, "lora")
    name = next(each for each in graft.adapters if each.endswith("layers.0.self_attn.q_proj"))
    site = model.get_submodule(name)
    x = normal(2, 3, layer.in_features, seed=5)
    B, A = graft.adapters[name].factors()
    close(site(x), layer.product(x) + x @ A.T @ B.T, 1e-5)
    output(model, ids).sum().backward()
    assert all(p.grad is not None for p in graft.parameters())
    with FakeTensorMode():
        fake = apply_storage(tiny.llama(), config)
        logits = fake(input_ids=torch.zeros(2, 8, dtype=torch.int64)).logits
        logits.sum().backward()
        assert logits.shape == (2, 8, tiny.VOCAB)
    with pytest.raises(UsageError, match="activations"):
        make_config("storage", "int4", activations="int5")

"""Bottleneck adapters against their equations in float64, a model with the networks built in by hand, and the count formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graftwork
import tiny
from adapter_support import close, fill, output
from graftwork.errors import UsageError
from graftwork.modeling.protocols import Base
from graftwork.modeling.state import state_of

IDS = tiny.tokens(2, 7)
PLAIN = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda v: v}


def filled(model, name="a", seed=1, **options):
    return fill(graftwork.attach(model, "bottleneck", name=name, seed=seed, **{"r": 5, **options}), seed + 1)


@pytest.mark.parametrize("position", ["serial", "parallel"])
@pytest.mark.parametrize("activation", PLAIN)
@torch.no_grad()
def test_equations_in_float64(position, activation):
    graft = filled(tiny.gpt2(), position=position, activation=activation, scaling=0.7)
    x = {n: torch.randn(3, a.in_features, generator=torch.Generator().manual_seed(2)) for n, a in graft.adapters.items()}
    for name, adapter in graft.adapters.items():
        base = graft.base_of(graft.sites[name])
        p = {n: v.double() for n, v in adapter.named_parameters()}
        y = x[name].double() @ base.weight().double().T + base.bias.double()
        read = y if position == "serial" else x[name].double()
        wanted = y + 0.7 * (PLAIN[activation](read @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"])
        close(adapter(x[name], base), wanted, 1e-6)


class Behind(nn.Module):
    """An independent serial adapter: the map, then a residual two-layer network."""

    def __init__(self, inner, adapter):
        super().__init__()
        self.inner, self.first, self.second = inner, nn.Linear(adapter.out_features, 5), nn.Linear(5, adapter.out_features)
        self.first.weight, self.first.bias = nn.Parameter(adapter.down.clone()), nn.Parameter(adapter.down_bias.clone())
        self.second.weight, self.second.bias = nn.Parameter(adapter.up.clone()), nn.Parameter(adapter.up_bias.clone())

    def forward(self, x):
        y = self.inner(x)
        return y + self.second(F.gelu(self.first(y)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_a_model_with_the_networks_built_in(kind):
    model, by_hand = tiny.ALL[kind](), tiny.ALL[kind]()
    graft = filled(model)
    assert {s.role for s in graft.sites.values()} == {"llama": {"o", "down"}}.get(kind, {"o", "fc2"})
    assert len(graft.sites) == 2 * tiny.LAYERS
    for name, adapter in graft.adapters.items():
        parent, _, last = name.rpartition(".")
        setattr(by_hand.get_submodule(parent), last, Behind(by_hand.get_submodule(name), adapter))
    close(output(model, IDS), output(by_hand, IDS), 1e-5)


def test_gradients_are_those_of_float64():
    graft = filled(tiny.llama(), target_modules=["down_proj"])
    name, adapter = next(iter(graft.adapters.items()))
    base = graft.base_of(graft.sites[name])
    x = torch.randn(4, adapter.in_features, generator=torch.Generator().manual_seed(5))
    adapter(x, base).square().sum().backward()
    p = {n: v.detach().double().requires_grad_() for n, v in adapter.named_parameters()}
    y = x.double() @ base.weight().double().T
    (y + F.gelu(y @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]).square().sum().backward()
    for n, v in adapter.named_parameters():
        close(v.grad, p[n].grad, 1e-5)


@torch.no_grad()
def test_every_option_changes_the_output():
    def logits(**options):
        return output(filled(tiny.llama(), **options).model, IDS)

    plain = logits()
    for options in ({"r": 3}, {"activation": "relu"}, {"scaling": 2.0}, {"position": "parallel"}, {"bias": False},
                    {"rank_pattern": {"down_proj": 2}}, {"target_modules": ["o"]}):
        assert (logits(**options) - plain).abs().max() > 1e-3, options


@pytest.mark.parametrize("position, bias", [("serial", True), ("parallel", False)])
def test_count(position, bias):
    graft = graftwork.attach(tiny.llama(), "bottleneck", r=7, position=position, bias=bias, rank_pattern={"o_proj": 3})
    d, f = tiny.HIDDEN, tiny.FFN
    one = 3 * (d + d) + 7 * (d + (d if position == "serial" else f)) + ((3 + d + 7 + d) if bias else 0)
    assert graft.parameter_count() == tiny.LAYERS * one


@torch.no_grad()
def test_rows_of_unlike_networks_share_one_product():
    """One bank holds serial and parallel networks of every activation and several ranks; W is multiplied once."""
    model = tiny.gpt2()
    options = [{"position": p, "activation": a, "r": r, "bias": b, "scaling": s} for p, a, r, b, s in (
        ("serial", "relu", 4, True, 1.0), ("parallel", "tanh", 2, True, 2.0), ("serial", "identity", 6, False, 0.5))]
    grafts = {f"g{i}": filled(model, f"g{i}", i + 1, **o) for i, o in enumerate(options)}
    rows, ids = ["g1", None, "g0", "g2", "g1"], tiny.tokens(5, 6)
    calls, product = [], Base.product
    try:
        Base.product = lambda self, *a: calls.append(1) or product(self, *a)
        with graftwork.routing(model, rows):
            mixed = output(model, ids)
    finally:
        Base.product = product
    assert len(calls) == len(grafts["g0"].sites)
    for name in grafts:
        with state_of(model).scope(disabled=frozenset(grafts) - {name}):
            alone = output(model, ids)
        for i in (i for i, row in enumerate(rows) if row == name):
            close(mixed[i], alone[i], 1e-5)
    with pytest.raises(graftwork.GraftworkError, match="cannot be added"):
        output(model, ids)


@torch.no_grad()
def test_a_slice_of_a_fused_projection():
    model = tiny.gpt2()
    graft = filled(model, target_modules="v")
    seen, module = [], model.transformer.h[0].attn.c_attn
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    output(model, IDS)
    handle.remove()
    (x, out), adapter = seen[0], graft.adapters["transformer.h.0.attn.c_attn[v]"]
    y = x @ module.weight + module.bias
    assert torch.allclose(out[..., :128], y[..., :128], atol=1e-6)
    v = y[..., 128:]
    wanted = v + F.gelu(v @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
    close(out[..., 128:], wanted, 1e-5)


def test_refusals():
    with pytest.raises(UsageError, match="r=65 is no bottleneck"):
        graftwork.attach(tiny.llama(), "bottleneck", r=65)
    with pytest.raises(UsageError, match="activation"):
        graftwork.attach(tiny.llama(), "bottleneck", activation="swish7")
    graft = filled(tiny.llama())
    for call in (graft.merge, graft.to_lora, graft.delta_weights, lambda: graft.scale(0.5)):
        with pytest.raises(graftwork.GraftworkError):
            call()
    with pytest.raises(graftwork.GraftworkError, match="starts"):
        graftwork.attach(tiny.llama(), "bottleneck", initializer="pissa", r=4)

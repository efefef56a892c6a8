"""Grafts on plain torch models: containers keep their children, whatever the sites of a method share."""

import pytest
import torch
from torch import nn

import graftwork
from adapter_support import SITE, attach, close
from graftwork.adapters.base import Adapter
from graftwork.registry import lookup

SHARED = [m for m in SITE if lookup("adapter", m).cls.make_shared.__func__ is not Adapter.make_shared.__func__ and m != "s2ft"]
LINES = ["vera", "randlora", "mos"]


def stack():
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 48), nn.Sequential(nn.Linear(48, 32), nn.Tanh()))


def test_the_methods_that_share_something_are_here():
    assert {*LINES} <= set(SHARED) and set(SHARED) <= set(SITE) and SHARED == sorted(SHARED)


@pytest.mark.parametrize("method", SHARED)
def test_a_sequential_runs_and_counts_its_own_children_only(method):
    model, x = stack(), torch.randn(5, 32)
    before, classes, state = model(x), [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    children = list(model)
    graft = attach(model, method, filled=False, target_modules="all-linear")
    assert len(model) == 4 and list(model) == children and model[-1] is children[-1] and len(model[1:3]) == 2
    if lookup("adapter", method).traits["starts_at_identity"]:
        close(model(x), before, 1e-5)
    second = attach(model, method, name="b", seed=3, target_modules="all-linear")
    with graftwork.routing(model, ["a", "b", None, "a", "b"]):
        mixed = model(x)
    close(mixed[2], before[2], 1e-6)
    mixed.square().sum().backward()
    assert all(p.grad is not None for p in graft.parameters()) and all(p.device == x.device for p in graft.shared.parameters())
    second.detach()
    graft.detach()
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[k], state[k]) for k in state)
    assert [type(m) for m in model.modules()] == classes and torch.equal(model(x), before)

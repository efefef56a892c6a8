"""DoRA: peft's layer (logits, gradients, merged weights); the detached norm against the closed form; exact start; kept norms."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import graftwork
import tiny
from adapter_support import attach, close, fill, output, same_as_twin
from graftwork.errors import UsageError
from graftwork.modeling.protocols import Base
from graftwork.registry import make_config
from graftwork.storage.base import apply_storage

IDS = tiny.tokens(2, 7)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query", "output.dense"]}


def twin_of(model, graft, kind, **options):
    """peft's DoRA on a copy of the model, with the values of the graft."""
    config = peft.LoraConfig(use_dora=True, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", **options)
    twin = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            layer = twin.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.lora_A)
            layer.lora_B["default"].weight.copy_(adapter.lora_B)
            layer.lora_magnitude_vector["default"].weight.copy_(adapter.magnitude)
    return twin


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gives_the_same_logits_and_gradients(kind, rslora):
    model = tiny.ALL[kind]()
    plain = copy.deepcopy(model)
    graft = fill(graftwork.attach(model, "dora", r=4, alpha=10.0, use_rslora=rslora, target_modules=TARGETS[kind]))
    twin = twin_of(plain, graft, kind, r=4, lora_alpha=10, use_rslora=rslora)
    layers = {name: twin.base_model.model.get_submodule(name) for name in graft.adapters}
    same_as_twin(model, twin, plain, IDS, [
        pair for name, adapter in graft.adapters.items() for pair in (
            (adapter.lora_A, layers[name].lora_A["default"].weight), (adapter.lora_B, layers[name].lora_B["default"].weight),
            (adapter.magnitude, layers[name].lora_magnitude_vector["default"].weight))])
    with torch.no_grad():
        graft.merge()
        close(output(model, IDS), output(twin.merge_and_unload(), IDS), 1e-5)


def test_the_norm_is_a_constant_of_the_backward_pass():
    model = tiny.llama()
    graft = attach(model, "dora", r=3, alpha=6.0, target_modules=["layers.0.mlp.down_proj"])
    ((name, adapter),) = graft.adapters.items()
    module, base = model.get_submodule(name), graft.base_of(graft.sites[name])
    x, probe = torch.randn(5, adapter.in_features), torch.randn(5, adapter.out_features)
    adapter(x, base).mul(probe).sum().backward()
    W, s = module.weight.detach().double(), adapter.scale
    A, B, m = (p.detach().double().requires_grad_() for p in (adapter.lora_A, adapter.lora_B, adapter.magnitude))

    def gradients(detach):
        V = W + s * B @ A
        norm = V.norm(dim=1, keepdim=True)
        weight = V * (m[:, None] / (norm.detach() if detach else norm))
        return torch.autograd.grad(((x.double() @ weight.T) * probe.double()).sum(), (A, B, m))

    constant, live = gradients(True), gradients(False)
    for got, wanted in zip((adapter.lora_A.grad, adapter.lora_B.grad, adapter.magnitude.grad), constant, strict=True):
        close(got, wanted, 1e-5)
    assert (live[0] - constant[0]).abs().max() > 1e-3 * constant[0].abs().max(), "the two must differ for this to say anything"


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@torch.no_grad()
def test_the_start_is_exact_on_the_weight_as_it_is_stored(storage):
    model = tiny.llama()
    apply_storage(model, make_config("storage", storage))
    before = output(model, IDS)
    graft = attach(model, "dora", filled=False)
    for name, adapter in graft.adapters.items():
        base = graft.base_of(graft.sites[name])
        assert not adapter.growth(base).any()
        close(adapter.magnitude, base.weight().double().norm(dim=1), 1e-6)
    close(output(model, IDS), before, 1e-6)


def test_saved_magnitudes_are_not_started_again(tmp_path):
    model = tiny.llama()
    graft = attach(model, "dora")
    graft.save(tmp_path / "saved")
    again = tiny.llama()
    loaded = graftwork.attach_saved(again, tmp_path / "saved")
    for name, adapter in loaded.adapters.items():
        assert torch.equal(adapter.magnitude, graft.adapters[name].magnitude)


@torch.no_grad()
def test_a_kept_norm_follows_the_values_and_the_weight():
    model = tiny.llama()
    graft = attach(model, "dora", target_modules=["layers.0.mlp.down_proj"])
    ((name, adapter),) = graft.adapters.items()
    base, module = graft.base_of(graft.sites[name]), model.get_submodule(name)
    first = adapter.growth(base)
    assert adapter.growth(base) is first
    adapter.lora_B.add_(0.1)
    second = adapter.growth(base)
    assert not torch.equal(first, second)
    module.weight.mul_(2.0)
    third = adapter.growth(base)
    assert not torch.equal(second, third)
    adapter.magnitude.mul_(2.0)
    wanted = adapter.magnitude / (module.weight + adapter.scale * adapter.lora_B @ adapter.lora_A).norm(dim=1) - 1
    close(adapter.growth(base), wanted, 1e-6)


class Products(TorchDispatchMode):
    """Counts the products with a (out, in) weight, whichever operator does them."""

    def __init__(self, weight):
        super().__init__()
        self.pointer, self.count = weight.data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "linear"):
            self.count += any(isinstance(a, torch.Tensor) and a.data_ptr() == self.pointer for a in args[-2:])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_rows_of_several_adapters_multiply_the_weight_once():
    model = tiny.gpt2()
    module = model.transformer.h[0].mlp.c_proj
    grafts = [attach(model, "dora", name=f"g{i}", r=r, seed=i, target_modules=["mlp.c_proj"]) for i, r in enumerate((1, 3))]
    site = "transformer.h.0.mlp.c_proj"
    x = torch.randn(5, 3, module.weight.shape[0])
    rows = ["g0", None, "g1", "g0", None]
    with graftwork.routing(model, rows):
        mixed = module(x)
        with Products(module.weight) as counted:
            module(x)
    assert counted.count == 1
    for i, row in enumerate(rows):
        weight = module.weight.T.double()
        if row is not None:
            a = grafts[int(row[1])].adapters[site]
            V = weight + a.scale * a.lora_B.double() @ a.lora_A.double()
            weight = V * (a.magnitude.double() / V.norm(dim=1))[:, None]
        close(mixed[i], x[i].double() @ weight.T + module.bias.double(), 1e-5)


def test_rates_and_dropped_inputs():
    """Dropout reaches the low-rank path only: with B = 0 it changes nothing."""
    model = tiny.llama()
    graft = attach(model, "dora", filled=False, dropout=0.5)
    before = output(model, IDS)
    model.train()
    close(output(model, IDS), before, 1e-6)
    fill(graft)
    assert not torch.equal(output(model, IDS), output(model.eval(), IDS))


def test_gradients_of_rows_are_those_of_the_rows_alone():
    model = tiny.llama()
    graft = attach(model, "dora", target_modules=["q_proj"])
    attach(model, "dora", name="b", seed=5, r=2, target_modules=["q_proj"])
    with graftwork.routing(model, ["a", "b"]):
        output(model, IDS)[:1].square().sum().backward()
    rows = [p.grad.clone() for p in graft.parameters()]
    model.zero_grad()
    with graftwork.routing(model, ["a"]):
        output(model, IDS[:1]).square().sum().backward()
    for got, p in zip(rows, graft.parameters(), strict=True):
        close(got, p.grad, 1e-4)


def test_ranks():
    model = tiny.llama()
    graft = attach(model, "dora", r=4, alpha=8.0, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6.0})
    found = {(a.r, a.scale) for n, a in graft.adapters.items() if n.endswith("q_proj")}
    assert found == {(2, 3.0)} and {a.r for a in graft.adapters.values()} == {2, 4}
    with pytest.raises(UsageError, match="r=40.*32 x 64"):
        attach(tiny.llama(), "dora", r=40)


def test_pieces_of_rows_are_the_whole(monkeypatch):
    from graftwork.adapters import dora

    model = tiny.llama()
    graft = attach(model, "dora", target_modules=["layers.0.mlp.down_proj"])
    ((name, adapter),) = graft.adapters.items()
    base = Base(graft.sites[name].product)
    whole = adapter._growth(base)
    monkeypatch.setattr(dora, "PIECE", 96 * 7)
    close(adapter._growth(base), whole, 1e-5)

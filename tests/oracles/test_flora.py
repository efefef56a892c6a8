"""FLoRA: loop = materialised weights = one product; gradients; the start; peft's HiRA as the residual form."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters.flora import FLoRAAdapter
from graftwork.modeling.protocols import Base, LinearProduct

IDS = tiny.tokens(2, 7)


def mask(adapter):
    """M (out, in) in fp64 by the definition: sum_j a_j b_j^T with the first component kept as difference from one."""
    A, B = adapter.flora_A.detach().double().clone(), adapter.flora_B.detach().double().clone()
    A[0] += 1
    B[0] += 1
    return sum(torch.outer(A[j], B[j]) for j in range(A.shape[0]))


@pytest.mark.parametrize("ranks", [[1, 1, 1], [2, 2, 2], [3, 1, 2]])
@torch.no_grad()
def test_loop_materialised_and_shared_product_agree(ranks):
    """Eight rows, three adapters of one real layer, base rows among them."""
    model = tiny.gpt2()
    module = model.transformer.h[0].mlp.c_proj
    grafts = [attach(model, "flora", name=f"g{i}", r=r, seed=i, target_modules=["mlp.c_proj"]) for i, r in enumerate(ranks)]
    adapters = [g.adapters["transformer.h.0.mlp.c_proj"] for g in grafts]
    rows = [0, 2, None, 1, 1, None, 0, 2]
    x = torch.randn(8, 5, module.weight.shape[0])
    weight, bias = module.weight.T.double(), module.bias.double()
    weights = [weight if a is None else weight * mask(adapters[a]) for a in rows]
    loop = torch.stack([x[i].double() @ weights[i].T + bias for i in range(len(rows))])
    with graftwork.routing(model, [None if a is None else f"g{a}" for a in rows]):
        close(module(x), loop, 1e-5)
    for i, a in enumerate(rows):
        if a is not None:
            close(adapters[a](x[i], grafts[a].base_of(grafts[a].sites["transformer.h.0.mlp.c_proj"])), loop[i], 1e-5)


@pytest.mark.parametrize("r", [1, 3])
def test_gradients_equal_autograd_through_the_mask(r):
    model = tiny.llama()
    graft = attach(model, "flora", r=r, target_modules=["down_proj"])
    name, adapter = next(iter(graft.adapters.items()))
    module = model.get_submodule(name)
    x = torch.randn(4, module.in_features, requires_grad=True)
    g = torch.randn(4, module.out_features)
    module(x).mul(g).sum().backward()
    A, B = adapter.flora_A.detach().double().requires_grad_(), adapter.flora_B.detach().double().requires_grad_()
    one = torch.zeros(r, 1, dtype=torch.float64)
    one[0] = 1
    M = torch.einsum("ro,ri->oi", A + one, B + one)
    y = x.detach().double().requires_grad_()
    ((y @ (module.weight.double() * M).T) * g.double()).sum().backward()
    close(adapter.flora_A.grad, A.grad, 1e-5)
    close(adapter.flora_B.grad, B.grad, 1e-5)
    close(x.grad, y.grad, 1e-5)


def test_components_stay_apart():
    """From an all-ones start every component would keep the same values and the mask would have rank 1."""
    model = tiny.llama()
    graft = graftwork.attach(model, "flora", r=3)
    for adapter in graft.adapters.values():
        assert torch.equal(mask(adapter), torch.ones(adapter.out_features, adapter.in_features, dtype=torch.float64))
    optimizer = torch.optim.Adam(graft.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        output(model, IDS).square().mean().backward()
        optimizer.step()
    for adapter in graft.adapters.values():
        singular = torch.linalg.svdvals(mask(adapter) - 1.0)
        assert singular[2] > 1e-3 * singular[0]
        assert all(p.grad[j].any() for p in (adapter.flora_A, adapter.flora_B) for j in range(3))


def test_the_residual_form_is_hira():
    """Components 2..r beside an untouched first one are W * (1 + A^T B), which is peft's HiRA with hira_A = b, hira_B = a^T."""
    model = tiny.llama()
    twin = peft.get_peft_model(copy.deepcopy(model), peft.HiraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    graft = fill(graftwork.attach(model, "flora", r=3, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            adapter.flora_A[0] = adapter.flora_B[0] = 0.0
            layer = twin.base_model.model.get_submodule(name)
            layer.hira_A["default"].copy_(adapter.flora_B[1:])
            layer.hira_B["default"].copy_(adapter.flora_A[1:].T)
    close(output(model, IDS), output(twin, IDS), 1e-5)


def test_output_scaling_is_ia3():
    """b = 1 leaves y = a * (W x): peft's IA3 on a map without feed-forward role."""
    model = tiny.llama()
    twin = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])).eval()
    graft = fill(graftwork.attach(model, "flora", r=1, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            adapter.flora_B.zero_()
            twin.base_model.model.get_submodule(name).ia3_l["default"].copy_(1 + adapter.flora_A.T)
    close(output(model, IDS), output(twin, IDS), 1e-5)


def test_bf16_keeps_small_changes():
    """A change of three per mille moves the bf16 output: 1.003 itself would round to 1."""
    layer = torch.nn.Linear(64, 64, bias=False).bfloat16()
    adapter = FLoRAAdapter.__new__(FLoRAAdapter)
    torch.nn.Module.__init__(adapter)
    adapter.r, adapter.flora_A = 1, torch.nn.Parameter(torch.full((1, 64), 3e-3))
    adapter.flora_B = torch.nn.Parameter(torch.zeros(1, 64))
    base = Base(LinearProduct(layer))
    x = torch.randn(512, 64).bfloat16()
    plain, moved = base(x).float(), adapter(x, base).float()
    assert torch.tensor(1.003).bfloat16() == 1
    share = ((moved - plain) * plain).sum() / plain.square().sum()
    assert share.item() == pytest.approx(3e-3, rel=0.5)


class Products(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            left = args[1] if func.overloadpacket is torch.ops.aten.addmm else args[0]
            self.rows.append(left.shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("r, fold", [(1, 1), (4, 4)])
def test_no_product_but_the_base(r, fold):
    model = tiny.llama()
    graft = attach(model, "flora", r=r, target_modules=["up_proj"])
    name, adapter = next(iter(graft.adapters.items()))
    base = graft.base_of(graft.sites[name])
    with torch.no_grad(), Products() as seen:
        adapter(torch.randn(6, adapter.in_features), base)
    assert seen.rows == [6 * fold]


def test_rank_one_saves_the_input_and_one_output():
    """Saved for the backward pass: x (shared with its producer), the product, and the two factors' own values."""
    model = tiny.llama()
    graft = attach(model, "flora", r=1, target_modules=["up_proj"])
    name, adapter = next(iter(graft.adapters.items()))
    base = graft.base_of(graft.sites[name])
    x = torch.randn(6, adapter.in_features, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in [*adapter.parameters(), *model.parameters(), x]}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t):
        adapter(x, base)
    assert sum(v for k, v in saved.items() if k not in own) == 6 * adapter.out_features * 4

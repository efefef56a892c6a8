"""Adam-mini against the adam-mini package step by step where their blocks agree, and against its equations in float64."""

from types import SimpleNamespace

import adam_mini
import pytest
import torch
from torch import nn

from graftwork.optim import optimizer, parameter_groups
from graftwork.registry import lookup


class Block(nn.Module):
    def __init__(self, width, heads, kv_heads, size):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(width, heads * size), nn.Linear(heads * size, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * size, bias=False) for _ in range(2))
        self.mlp, self.norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width, bias=False)


class Model(nn.Module):
    def __init__(self, width=12, heads=4, kv_heads=2, size=3, **config):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width, num_attention_heads=heads, **config)
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([Block(width, heads, kv_heads, size)])
        self.lm_head = nn.Linear(width, 11, bias=False)


def model(**config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(**config)


def feed(step, *models):
    generator = torch.Generator().manual_seed(step)
    for params in zip(*(m.parameters() for m in models)):
        grad = torch.randn(params[0].shape, generator=generator)
        for p in params:
            p.grad = grad.clone()


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_package(decay):
    ours, theirs = model(), model()
    mine = optimizer("adam_mini", ours, lr=1e-2, weight_decay=decay, betas=(0.8, 0.95), eps=1e-6)
    reference = adam_mini.Adam_mini(list(theirs.named_parameters()), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay,
                                    dim=12, n_heads=4, n_kv_heads=2, verbose=False)
    for step in range(8):
        feed(step, ours, theirs)
        mine.step()
        reference.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    second = {n: mine.state[p]["exp_avg_sq"].numel() for n, p in ours.named_parameters()}
    blocks = {n: reference.state[q].get("vmean", reference.state[q].get("v")).numel() for n, q in theirs.named_parameters()}
    assert second == blocks
    assert second["layers.0.q_proj.weight"] == 4 and second["layers.0.k_proj.weight"] == 2 and second["layers.0.norm.weight"] == 1


@pytest.mark.parametrize("role, shape, blocks", [("linear", (6, 4), [[i] for i in range(6)]), ("head3", (6, 4), [[0, 1, 2], [3, 4, 5]]),
                                                 ("columns", (4, 6), None), ("norm", (6,), [list(range(6))]),
                                                 ("linear", (2, 3, 4), [[0], [1]]), ("other", (6,), [[i] for i in range(6)])])
def test_equations_of_every_role(role, shape, blocks):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    mine = optimizer("adam_mini", [{"params": [p], "role": role}], lr=0.1, weight_decay=0.3)
    w, m = start.clone(), torch.zeros(shape, dtype=torch.float64)
    v = torch.zeros(shape, dtype=torch.float64)  # one number a weight, equal within a block
    for t in range(1, 5):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        mine.step()
        mean = p.grad.square()
        if blocks is None:
            mean = mean.mean(0, keepdim=True).expand(shape)
        else:
            mean = torch.cat([mean[rows].mean().expand(mean[rows].shape) for rows in blocks])
        m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * mean
        w = w * (1 - 0.03) - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)
    assert mine.state[p]["exp_avg_sq"].unique().numel() == (shape[-1] if blocks is None else len(blocks))


def test_is_adam_where_gradients_are_equal_in_size_within_a_row():
    ours, theirs = model(), model()
    mine, reference = optimizer("adam_mini", list(ours.parameters()), lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(ours.parameters(), theirs.parameters()):
            size = torch.rand((p.shape[0], *[1] * (p.ndim - 1)), generator=generator)
            p.grad = torch.randn(p.shape, generator=generator).sign() * size
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_roles_come_from_the_model():
    def roles(built):
        return {id(p): group["role"] for group in built.param_groups for p in group["params"]}

    wide = model(size=4, head_dim=4)  # head size times heads is not the width, as in some published models
    found = roles(optimizer("adam_mini", wide))
    layer = wide.layers[0]
    assert found[id(layer.q_proj.weight)] == found[id(layer.k_proj.weight)] == "head4"
    assert found[id(layer.v_proj.weight)] == "linear" and found[id(wide.embed.weight)] == "other"
    assert found[id(layer.norm.weight)] == "norm" and found[id(layer.q_proj.bias)] == "other"
    odd = model(size=3, head_dim=5)  # does not divide: by rows
    assert roles(optimizer("adam_mini", odd))[id(odd.layers[0].q_proj.weight)] == "linear"
    without = model()
    del without.config
    assert roles(optimizer("adam_mini", without))[id(without.layers[0].q_proj.weight)] == "linear"
    groups = optimizer("adam_mini", model(), weight_decay=0.1).param_groups
    assert {(g["role"], g["weight_decay"]) for g in groups} == {("linear", 0.1), ("head3", 0.1), ("other", 0.1), ("other", 0.0),
                                                               ("norm", 0.0)}
    assert len(parameter_groups(without)) == 3


def test_conv1d_goes_by_outputs():
    Conv1D = type("Conv1D", (nn.Module,), {})
    layer = Conv1D()
    layer.weight = nn.Parameter(torch.ones(3, 5))
    built = optimizer("adam_mini", layer)
    layer.weight.grad = torch.ones(3, 5)
    built.step()
    assert built.state[layer.weight]["exp_avg_sq"].shape == (5,)


def test_layout_does_not_matter():
    finals = []
    for transposed in (False, True):
        start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        p = nn.Parameter(start.T.contiguous().T if transposed else start)
        built = optimizer("adam_mini", [p], lr=0.1)
        p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).T
        built.step()
        finals.append(p.detach())
    assert torch.equal(*finals)


def test_state_is_mn_plus_m():
    size = lookup("optimizer", "adam_mini").cls.state_bytes
    assert size((20, 10)) == 4 * (200 + 20) + 4 and size((20, 10), role="head5") == 4 * (200 + 4) + 4
    assert size((20, 10), role="columns") == 4 * (200 + 10) + 4
    assert size((20,), role="norm") == 4 * 21 + 4 and size((20,)) == 4 * 40 + 4

"""SGD against torch.optim.SGD, Lion against its equations in float64, Adafactor against transformers' Adafactor: step by step."""

import pytest
import torch
import transformers

from graftwork.errors import UsageError
from graftwork.optim import optimizer
from graftwork.registry import lookup

SHAPES = [(24, 16), (6, 30), (7,), (5, 1), ()]


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def side_by_side(mine, ours, theirs_step, theirs, steps=8, **close):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p, q in zip(ours, theirs):
            grad = torch.randn(p.shape, generator=generator)
            p.grad, q.grad = grad.to(p.dtype), grad.to(p.dtype).to(q.dtype)
        mine.step()
        theirs_step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p.detach().to(q.dtype), q.detach(), **close)


def together(params, decay):
    """One group, so that vectors decay as in torch's optimizers."""
    return [{"params": params, "weight_decay": decay}]


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.8, True)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_equals_torch(momentum, nesterov, decay):
    ours, theirs = parameters(), parameters()
    mine = optimizer("sgd", together(ours, decay), lr=0.1, momentum=momentum, nesterov=nesterov, coupled_decay=True)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=True)
    side_by_side(mine, ours, reference.step, theirs, rtol=0, atol=0)
    assert all(("momentum_buffer" in mine.state[p]) == (momentum > 0) for p in ours)


def test_sgd_decays_apart_from_the_momentum_unless_coupled():
    finals = []
    for coupled in (False, True):
        (p,) = parameters([(4, 3)])
        q = p.detach().clone()
        built = optimizer("sgd", [p], lr=0.1, weight_decay=0.5, coupled_decay=coupled)
        buffer, generator = torch.zeros(4, 3), torch.Generator().manual_seed(2)
        for _ in range(4):
            p.grad = torch.randn(4, 3, generator=generator)
            built.step()
            buffer = 0.9 * buffer + p.grad
            q = q * 0.95 - 0.1 * buffer
        finals.append((p.detach() - q).abs().max())
    assert finals[0] < 1e-6 and finals[1] > 1e-2


def test_sgd_state_and_options():
    size = lookup("optimizer", "sgd").cls.state_bytes
    assert size((20, 10)) == 4 * 200 + 4 and size((20, 10), momentum=0.0) == 4
    assert size((20, 10), torch.bfloat16, state_dtype="bfloat16") == 2 * 200 + 4
    with pytest.raises(UsageError, match="nesterov needs momentum"):
        optimizer("sgd", parameters(), momentum=0, nesterov=True)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lion_equals_its_equations(decay):
    ours = parameters()
    theirs = [torch.nn.Parameter(p.detach().double()) for p in ours]
    moments = [torch.zeros_like(q) for q in theirs]
    mine = optimizer("lion", together(ours, decay), lr=1e-2, betas=(0.8, 0.95))

    @torch.no_grad()
    def step():
        for q, m in zip(theirs, moments):
            update = torch.sign(0.8 * m + 0.2 * q.grad)
            q.copy_(q * (1 - 1e-2 * decay) - 1e-2 * update)
            m.copy_(0.95 * m + 0.05 * q.grad)

    side_by_side(mine, ours, step, theirs, rtol=1e-5, atol=1e-6)
    for p, m in zip(ours, moments):
        torch.testing.assert_close(mine.state[p]["exp_avg"].double(), m, rtol=1e-5, atol=1e-6)
    assert lookup("optimizer", "lion").cls.state_bytes((20, 10)) == 4 * 200 + 4


@pytest.mark.slow  # loads transformers.Adafactor
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9}, {"scale_parameter": True}, {"clip_threshold": 0.5, "decay_rate": -0.5},
                                     {"scale_parameter": True, "beta1": 0.5, "eps": (1e-6, 2.0)}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_equals_transformers(options, decay):
    shapes = [(24, 16), (6, 30), (7,), (5, 1), (2, 3, 4)]
    ours, theirs = parameters(shapes), parameters(shapes)
    mine = optimizer("adafactor", together(ours, decay), lr=1e-2, **options)
    reference = transformers.Adafactor(theirs, lr=1e-2, relative_step=False, warmup_init=False, weight_decay=decay,
                                       **{"scale_parameter": False, **options})
    side_by_side(mine, ours, reference.step, theirs, rtol=1e-6, atol=1e-7)
    for p, q in zip(ours, theirs):
        for key, value in mine.state[p].items():
            torch.testing.assert_close(value, torch.as_tensor(reference.state[q][key], dtype=torch.float32), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_adafactor_on_bf16_weights_equals_transformers():
    ours, theirs = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    mine = optimizer("adafactor", together(ours, 0.0), lr=1e-2)
    reference = transformers.Adafactor(theirs, lr=1e-2, relative_step=False, scale_parameter=False)
    side_by_side(mine, ours, reference.step, theirs, rtol=0, atol=0)


def test_adafactor_keeps_m_plus_n():
    size = lookup("optimizer", "adafactor").cls.state_bytes
    assert size((20, 10)) == 4 * 30 + 4 and size((20,)) == 4 * 20 + 4 and size((20, 10), beta1=0.9) == 4 * 230 + 4

"""Updates of large tensors in pieces: the same bits as in one go, and temporaries of a piece's size."""

import pytest
import torch

from graftwork.modeling.blockwise import BLOCK
from graftwork.optim import base, optimizer, pieces
from graftwork.planning.ledger import Ledger

SHAPE = (1501, 8)  # no multiple of the block, and more than three pieces of 4096
CASES = [("adamw", {}), ("adamw", {"rounding": "stochastic"}), ("adamw", {"rounding": "kahan", "state_dtype": "bfloat16"}),
         ("adamw8bit", {"rounding": "stochastic"}), ("adamw8bit", {"min_8bit_size": 10_000}), ("sgd", {"nesterov": True}), ("lion", {}),
         ("lomo", {}), ("muon", {}), ("cosmos", {}), ("galore", {"state": "8bit", "state_dtype": "bfloat16"}), ("apollo", {}),
         ("q_galore", {}), ("frugal", {"rounding": "kahan"}), ("natural_galore", {}), ("gradnormlorp", {})]


def run(name, options, dtype, cut, monkeypatch, fused=False):
    monkeypatch.setattr(base, "LARGE", 4096 if cut else 10**9)
    monkeypatch.setattr(pieces, "PIECE", 16 * BLOCK)
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype))
    built = optimizer(name, [{"params": [p], "role": "other", "weight_decay": 0.1}], lr=1e-2, fused=fused, **options)
    seen = []
    apply = built._apply
    built._apply = lambda group, params: (seen.extend(q.numel() for q in params), apply(group, params))
    for _ in range(3):
        p.grad = torch.randn(SHAPE, generator=generator).to(dtype)
        built.step()
    assert seen == 3 * ([4096, 4096, 3816] if cut else [12008])
    assert list(built.state) == [p] and list(built._clocks) == [p] and built._clocks[p].step == built.state[p]["step"] == 3
    return {"weight": p.detach(), **built.state[p]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_pieces_are_the_whole_bit_for_bit(name, options, dtype, monkeypatch):
    whole, cut = (run(name, options, dtype, cut, monkeypatch) for cut in (False, True))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


def test_what_looks_at_the_whole_tensor_is_not_cut(monkeypatch):
    monkeypatch.setattr(base, "LARGE", 64)
    for name in ("adafactor", "came", "adam_mini", "galore", "muon", "cosmos"):
        cls = type(optimizer(name, [torch.nn.Parameter(torch.zeros(24, 16))]))
        assert not cls.elementwise(cls.config_class(), (24, 16), "linear")
    p = torch.nn.Parameter(torch.zeros(24, 16).T)  # not in the order of its gradient
    p.grad = torch.ones(16, 24)
    built = optimizer("sgd", [p], lr=1.0)
    built.step()
    assert torch.equal(p.detach(), -torch.ones(16, 24)) and not built._is_cut(built.param_groups[0], p)


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [("adamw", {}), ("adamw8bit", {"rounding": "stochastic"}), ("q_galore", {}), ("lion", {}),
                                           ("galore", {"state": "8bit", "rounding": "kahan"})])
def test_temporaries_of_a_tall_matrix_are_small(name, options, monkeypatch):
    monkeypatch.setattr(base, "LARGE", 2**14)
    monkeypatch.setattr(pieces, "PIECE", 2**12)
    p = torch.nn.Parameter(torch.zeros(8192, 32, dtype=torch.bfloat16))
    built = optimizer(name, [{"params": [p], "role": "other"}], **options)
    p.grad = torch.ones_like(p)
    with Ledger() as ledger:
        ledger.track([p, p.grad], "weights")
        ledger.track(built)
        built.step()
        ledger.reset_peak()
        before = ledger.live_bytes
        built.step()
    assert 0 < ledger.peak_bytes - before < 4 * p.numel() / 4

"""The Triton kernels in Triton's interpreter: each equals a loop over the rows in float64. Run by `make test-triton`.

The interpreter computes what a kernel says, on CPU tensors. It shows nothing of speed. test_triton_compiles.py compiles them."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: make test-triton", allow_module_level=True)
pytest.importorskip("triton", reason="make test-triton")

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.adapters import _triton, _triton_kernels, batched
from graftwork.adapters._triton_kernels import BLOCK_M, add_by_rows, add_by_tiles, add_change
from graftwork.adapters.batched import Bank, row_index
from graftwork.serving.engine import Engine, Request, Sampling
from graftwork.serving.engine.adapters import Attached

IN, OUT = 150, 170  # no multiples of any block, and more than the smaller ones
KERNELS = pytest.mark.parametrize("kernel", [add_by_rows, add_by_tiles])
RANKS = (8, 0, 64, 4, 17, 3)
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def bank_of(ranks, dtype=torch.float32, *, columns=False, biased=False):
    """A Bank, and (B (out, r), A (r, in)) of each adapter in float64 as the bank has them."""
    pairs = [(torch.randn(OUT, r) / 4, torch.randperm(IN)[:r] if columns else torch.randn(r, IN) / 8) for r in ranks]
    kept = [(B.to(dtype), A if columns else A.to(dtype)) for B, A in pairs]
    bias = torch.randn(len(ranks), OUT).to(dtype) if biased else None
    starts = torch.tensor([0, *ranks]).cumsum(0).tolist()
    lines = torch.cat([A for _, A in kept] + ([kept[0][1].new_zeros(1, *kept[0][1].shape[1:])] if len(set(ranks)) > 1 else []))
    rows = torch.cat([B.T for B, _ in kept] + ([kept[0][0].new_zeros(1, OUT)] if len(set(ranks)) > 1 else []))
    bank = Bank(lines, rows.contiguous(), tuple(ranks), IN, OUT, bias)
    assert list(bank.starts) == starts
    exact = torch.eye(IN, dtype=torch.float64)
    return bank, [(B.double(), exact[A] if columns else A.double()) for B, A in kept]


def wanted(y, x, numbers, pairs, bias=None, factors=None):
    """The rows one by one, dense, in float64."""
    result = y.double()
    for n, k in enumerate(numbers):
        if k >= 0:
            B, A = pairs[k]
            change = x[n].double() @ (B @ A).T + (0 if bias is None else bias[k].double())
            result[n] += change * (1 if factors is None else factors[n].double())
    return result


def check(kernel, numbers, *, ranks=RANKS, tokens=1, dtype=torch.float32, columns=False, biased=False, weighted=False):
    bank, pairs = bank_of(ranks, dtype, columns=columns, biased=biased)
    x, y = torch.randn(len(numbers), tokens, IN).to(dtype), torch.randn(len(numbers), tokens, OUT).to(dtype)
    factors = torch.randn(len(numbers)) if weighted else None
    right, before = wanted(y, x, numbers, pairs, bank.bias, factors), y.clone()
    kernel(y, x, torch.tensor(numbers, dtype=torch.int64), bank, factors)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), right, atol=2 * ROUNDED[dtype], rtol=ROUNDED[dtype])
    for n, k in enumerate(numbers):
        assert k >= 0 or torch.equal(y[n], before[n]), "a row without adapter was written"
    return y


# -- values -------------------------------------------------------------------------------------------------------------------
@KERNELS
@pytest.mark.parametrize("dtype", ROUNDED)
def test_rows_in_any_order_and_ranks_side_by_side(kernel, dtype):
    check(kernel, [4, -1, 0, 2, 4, 1, -1, 3, 2, 0, 0], tokens=2, dtype=dtype)
    check(kernel, [3, 0, -1, 4, 1, 2], dtype=dtype, biased=True, weighted=True)


@KERNELS
@pytest.mark.parametrize("numbers, ranks", [
    ([0], (5,)), ([0], (0,)), ([1], (0, 70)), ([], (3, 2)), ([-1, -1], (3,)), ([2, 2], (1, 4, 9, 2)), ([-1], (0, 0)), ([0, 1, 0], (0, 0))])
def test_one_row_none_and_adapters_without_rows(kernel, numbers, ranks):
    check(kernel, numbers, ranks=ranks)
    check(kernel, numbers, ranks=ranks, biased=True, weighted=True)


@KERNELS
def test_positions_of_columns(kernel):
    check(kernel, [2, 0, -1, 1, 2, 3], tokens=2, columns=True, biased=True)


def test_segments_longer_than_a_tile():
    sizes = {0: BLOCK_M, 1: BLOCK_M + 1, 2: 1, 4: 2 * BLOCK_M - 1}
    numbers = torch.tensor([k for k, size in sizes.items() for _ in range(size)])
    numbers = numbers[torch.randperm(len(numbers))].tolist()
    check(add_by_tiles, numbers, ranks=(6, 17, 2, 5, 9))
    order, tiles = _triton_kernels._tiles(torch.tensor(numbers), 5, 1)
    used = [(k, stop - begin) for k, begin, stop in tiles.tolist() if stop > begin]
    assert used == [(0, BLOCK_M), (1, BLOCK_M), (1, 1), (2, 1), (4, BLOCK_M), (4, BLOCK_M - 1)]
    assert [numbers[n] for n in order.tolist()] == sorted(numbers)


def test_rows_as_they_come_equal_sorted_segments_put_back():
    bank, _ = bank_of((8, 3, 64, 17))
    index = torch.tensor([3, 0, 2, 1, 2, 3, 3, 0, 2, 1, 0])
    x = torch.randn(len(index), 1, IN)
    unsorted, order = torch.zeros(len(index), 1, OUT), index.argsort(stable=True)
    segments = unsorted.clone()
    add_by_rows(unsorted, x, index, bank)
    add_by_tiles(segments, x[order], index[order], bank)
    torch.testing.assert_close(segments[order.argsort()], unsorted, atol=2e-6, rtol=2e-6)


@KERNELS
def test_part_of_the_outputs_and_inputs_that_lie_apart(kernel):
    bank, pairs = bank_of((4, 9))
    whole = torch.randn(5, 2, OUT + 21)
    x, before = torch.randn(5, IN, 2).transpose(1, 2), whole.clone()
    numbers = [1, -1, 0, 0, 1]
    right = wanted(whole[..., 13:13 + OUT], x, numbers, pairs)
    kernel(whole[..., 13:13 + OUT], x, torch.tensor(numbers), bank)
    torch.testing.assert_close(whole[..., 13:13 + OUT].double(), right, atol=5e-6, rtol=5e-6)
    assert torch.equal(whole[..., :13], before[..., :13]) and torch.equal(whole[..., 13 + OUT:], before[..., 13 + OUT:])
    with pytest.raises(ValueError, match="side by side"):
        kernel(torch.zeros(5, OUT, 2).transpose(1, 2), x, torch.tensor(numbers), bank)


@KERNELS
def test_a_broken_adapter_reaches_its_own_rows_only(kernel):
    bank, pairs = bank_of((8, 5))
    bank.A[8:13], bank.B[8:13] = float("nan"), float("inf")
    numbers, x, y = [0, 1, -1, 0, 1], torch.randn(5, 1, IN), torch.zeros(5, 1, OUT)
    kernel(y, x, torch.tensor(numbers), bank)
    healthy = [0, 2, 3]
    assert torch.isnan(y[[1, 4]]).all()
    torch.testing.assert_close(y[healthy].double(), wanted(torch.zeros(5, 1, OUT), x, [0, -1, -1, 0, -1], pairs)[healthy],
                               atol=4e-6, rtol=4e-6)


def test_a_row_does_not_depend_on_its_neighbors():
    bank, _ = bank_of(RANKS)
    x, index = torch.randn(6, 1, IN), torch.tensor([5, 2, 0, 4, 3, 2])
    mixed = torch.zeros(6, 1, OUT)
    add_by_rows(mixed, x, index, bank)
    for n in range(6):
        alone = torch.zeros(1, 1, OUT)
        add_by_rows(alone, x[n:n + 1], index[n:n + 1], bank)
        assert torch.equal(alone[0], mixed[n])


def test_many_rows_an_adapter_take_tiles(monkeypatch):
    taken = []
    for name in ("add_by_rows", "add_by_tiles"):
        monkeypatch.setattr(_triton_kernels, name, lambda *_, name=name: taken.append(name))
    bank, _ = bank_of((2, 2))
    for rows, tokens in ((4, 1), (16, 1), (2, 8), (15, 1)):
        add_change(torch.zeros(rows, tokens, OUT), torch.zeros(rows, tokens, IN), torch.zeros(rows, dtype=torch.int64), bank)
    assert taken == ["add_by_rows", "add_by_tiles", "add_by_tiles", "add_by_rows"]
    monkeypatch.undo()
    outputs = Bank(torch.randn(2, IN), torch.tensor([0, 3]), (2,), IN, OUT)
    with pytest.raises(ValueError, match="positions"):
        add_change(torch.zeros(1, 1, OUT), torch.zeros(1, 1, IN), torch.zeros(1, dtype=torch.int64), outputs)


# -- in models ----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch):
    """The CPU counts as a device of these kernels; their calls are counted."""
    calls, real = [], _triton_kernels.add_change
    monkeypatch.setattr(_triton, "DEVICES", {"cpu"})
    monkeypatch.setattr(_triton_kernels, "add_change", lambda y, *rest: (calls.append(y.shape), real(y, *rest)))
    return calls


@torch.no_grad()
def test_models_with_mixed_rows(counted, monkeypatch):
    """Ragged ranks, a bias, a weight, positions, a class with a kernel call of its own (MiSS), rows without adapter."""
    model = tiny.llama()
    attach(model, "lora", name="small", seed=1, r=2)
    attach(model, "lora", name="wide", seed=2, r=7, bias="lora_only").scale(0.5)
    attach(model, "paca", name="paca", seed=3)
    attach(model, "s2ft", name="rows", seed=4, target_modules=["up_proj"])
    attach(model, "miss", name="miss", seed=5)
    attach(model, "lora", name="part", seed=6, target_modules=["q_proj"])
    rows = ["small", None, "wide", "paca", "small", "rows", "miss", "part"]
    ids = tiny.tokens(len(rows), 3)
    with graftwork.routing(model, rows):
        mixed = output(model, ids)
        assert len(counted) > 20 and _triton.DEVICES == {"cpu"}
        monkeypatch.setattr(_triton, "DEVICES", {"cuda"})
        close(mixed, output(model, ids))


def test_the_engine(counted, monkeypatch):
    """Packed batches of prompts and single tokens; a sum of adapters."""
    model = tiny.llama()
    for n, r in enumerate((2, 9)):
        attach(model, "lora", name=f"a{n}", seed=n, r=r)

    names = ["a1", None, (("a0", 0.5), ("a1", -2.0)), "a0", "a1"]

    def tokens():
        engine = Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, adapters=Attached(model))
        requests = [Request(f"{n}", [5, 6, 7, 8, 9][: n + 2], name, Sampling(max_tokens=3)) for n, name in enumerate(names)]
        for request in requests:
            engine.add(request)
        while engine.busy:
            engine.step()
        engine.close()
        return [list(request.output) for request in requests]

    mixed, calls = tokens(), len(counted)
    assert calls > 20 and _triton.DEVICES == {"cpu"}
    monkeypatch.setattr(_triton, "DEVICES", {"cuda"})
    assert mixed == tokens() and len(counted) == calls


def test_learning_takes_other_kernels(counted):
    bank = Bank.of([(torch.randn(OUT, 2), torch.randn(2, IN).requires_grad_())], (OUT, IN), torch.float32)
    batched.change_of_rows(torch.randn(3, 1, IN), row_index([0, 0, 0], torch.device("cpu")), bank).sum().backward()
    assert not counted

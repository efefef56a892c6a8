"""The kernels for rows of different adapters: each equals the rows one by one, in values and gradients; the choice is the table's."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.adapters import _triton, batched
from graftwork.adapters.batched import DEFAULT, KERNELS, Bank, change_of_rows, choose, kernel_for, numbers_of, row_index

IN, OUT = 9, 7
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def pairs_of(kind, ranks, seed=0):
    """(B, A) of each adapter, as `Bank.of` takes them: random factors, one of them positions where the kind says so."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for r in ranks:
        A = torch.randperm(IN, generator=generator)[:r] if kind == "columns" else torch.randn(r, IN, generator=generator)
        B = torch.randperm(OUT, generator=generator)[:r] if kind == "outputs" else torch.randn(OUT, r, generator=generator)
        pairs.append((B, A))
    return pairs


def dense(B, A):
    """(out, in) in fp64."""
    B = torch.eye(OUT, dtype=torch.float64)[:, B] if B.dim() == 1 else B.double()
    return B @ (torch.eye(IN, dtype=torch.float64)[A] if A.dim() == 1 else A.double())


@pytest.fixture
def table(monkeypatch):
    """Sets the measured rows: (point, {kernel: time})."""
    def forget():
        for cached in (batched.measured, batched._points, batched._nearest):
            cached.cache_clear()

    def put(rows, tmp):
        names = list(KERNELS)
        tmp.write_text(json.dumps({"device": "cpu", "conditions": {}, "columns": [None] * 8 + names,
                                   "rows": [[*point, *(times.get(name) for name in names)] for point, times in rows]}))
        monkeypatch.setattr(batched, "TABLE", tmp)
        forget()

    yield put
    monkeypatch.undo()
    forget()


# -- values -------------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@settings(max_examples=60)
@given(kind=st.sampled_from(["factors", "columns", "outputs"]), ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4),
       tokens=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), biased=st.booleans(),
       numbers=st.lists(st.integers(0, 3), max_size=7), grad=st.booleans(), remembered=st.booleans())
def test_every_kernel_equals_the_rows_one_by_one(kind, ranks, tokens, dtype, biased, numbers, grad, remembered):
    numbers = [n % len(ranks) for n in numbers]
    pairs = pairs_of(kind, ranks)
    bias = torch.randn(len(ranks), OUT) if biased else None
    bank = Bank.of(pairs, (OUT, IN), dtype, bias=bias)
    assert bank.kind == kind and bank.A.shape[0] == bank.B.shape[0] == sum(ranks) + (len(set(ranks)) > 1)
    pairs = [tuple(t.to(bank.dtype) if t.is_floating_point() else t for t in pair) for pair in pairs]
    x = torch.randn(len(numbers), tokens, IN).to(bank.dtype).requires_grad_(grad)
    index = row_index(numbers, x.device) if remembered else torch.tensor(numbers, dtype=torch.int64)
    wanted = torch.zeros(len(numbers), tokens, OUT, dtype=torch.float64)
    for n, k in enumerate(numbers):
        wanted[n] = x[n].double() @ dense(*pairs[k]).T
    size = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[bank.dtype]
    for name, kernel in KERNELS.items():
        if numbers or name in ("stacked", "gathered"):
            for _ in range(2):  # the second call uses what the first one kept
                got = kernel(x, index, bank)
                assert got.shape == wanted.shape and got.dtype == bank.dtype, name
                torch.testing.assert_close(got.double(), wanted, atol=size * 10, rtol=size)
    got = change_of_rows(x, index, bank)
    for n, k in enumerate(numbers if biased else ()):
        wanted[n] += bias[k].to(bank.dtype).double()
    torch.testing.assert_close(got.double(), wanted, atol=size * 10, rtol=size)


@pytest.mark.parametrize("kind", ["factors", "columns", "outputs"])
@pytest.mark.parametrize("name", KERNELS)
def test_gradients_through_every_kernel(name, kind):
    numbers, ranks = [2, 0, 2, 1, 0], [3, 1, 4, 2]  # adapter 3 is in no row
    leaves = [[t.double().requires_grad_() if t.is_floating_point() else t for t in pair] for pair in pairs_of(kind, ranks)]
    learned = [t for pair in leaves for t in pair if t.is_floating_point()]
    x = torch.randn(5, 3, IN, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 3, OUT, dtype=torch.float64)
    got = KERNELS[name](x, row_index(numbers, x.device), Bank.of(leaves, (OUT, IN), torch.float64))
    got = torch.autograd.grad((got * g).sum(), [x, *learned])
    wanted = torch.autograd.grad(sum((x[n] @ dense(*leaves[k]).T * g[n]).sum() for n, k in enumerate(numbers)), [x, *learned],
                                 allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-12, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@torch.no_grad()
def test_mixed_models_by_every_kernel(name, monkeypatch):
    """Ragged ranks, a site that only some grafts have, base rows, methods with positions, a graft of weight other than 1."""
    model = tiny.llama()
    names = ["small", "wide", "paca", "rows", "nola", "part"]
    grafts = [attach(model, "lora", name="small", seed=1, r=2), attach(model, "lora", name="wide", seed=2, r=7, bias="lora_only"),
              attach(model, "paca", name="paca", seed=3), attach(model, "s2ft", name="rows", seed=4, target_modules=["up_proj"]),
              attach(model, "nola", name="nola", seed=5), attach(model, "lora", name="part", seed=6, target_modules=["q_proj"])]
    attach(model, "paca", name="few", seed=7, r=2)
    grafts[1].scale(0.5)
    rows = ["small", None, "wide", "few", "small", "paca", "rows", "nola", "part", "paca", "wide"]
    used = []
    monkeypatch.setattr(batched, "_pick", lambda *_: used.append(name) or name)
    ids = tiny.tokens(len(rows), 5)
    with graftwork.routing(model, rows):
        mixed = output(model, ids)
    assert used
    monkeypatch.undo()
    for i, row in enumerate(rows):
        with graftwork.routing(model, [row]):
            close(mixed[i: i + 1], output(model, ids[i: i + 1]))
    assert {"small", "part"} <= set(names)


@torch.no_grad()
def test_what_an_index_keeps_for_banks_is_bounded():
    """In traffic of many adapters the same order of rows meets ever other ranks."""
    x, index = torch.randn(3, 1, IN), row_index([0, 1, 0], CPU)
    for first in range(1, 8):
        for second in range(1, 20):
            pairs = [pairs_of("factors", [rank])[0] for rank in (first, second)]
            change_of_rows(x, index, Bank.of(pairs, (OUT, IN), torch.float32))
    assert 0 < len(index.made) <= batched.KEPT


@torch.no_grad()
def test_what_is_made_of_an_index_is_kept_with_it():
    bank = Bank.of(pairs_of("factors", [2, 3, 1]), (OUT, IN), torch.float32)
    x, index, other = torch.randn(4, 1, IN), row_index([2, 0, 1, 0], CPU), row_index([0, 0, 1, 2], CPU)
    first = batched.gathered(x, index, bank)
    kept = bank.made_of(index, batched._by_row)
    assert bank.made_of(index, batched._by_row) is kept and torch.equal(batched.gathered(x, index, bank), first)
    changed = batched.gathered(x, other, bank)
    assert not torch.equal(changed, first) and torch.equal(batched.gathered(x, index, bank), first)
    with torch.enable_grad():  # a gathered copy of a learned factor belongs to one graph
        learned = Bank.of([(B, A.requires_grad_()) for B, A in pairs_of("factors", [2, 2])], (OUT, IN), torch.float32)
        index = row_index([0, 1, 1, 0], CPU)
        assert learned.made_of(index, batched._by_row, keep=False) is not learned.made_of(index, batched._by_row, keep=False)
        batched.gathered(x, index, learned).sum().backward()
        batched.gathered(x, index, Bank.of(pairs_of("factors", [2, 2]), (OUT, IN), torch.float32))


def test_equal_neighbors_are_not_sorted():
    bank = Bank.of(pairs_of("factors", [2, 3, 1]), (OUT, IN), torch.float32)
    assert batched._sorted_runs(bank, row_index([1, 1, 0, 2, 2], CPU))[1:] == (None, None)
    runs, order, back = batched._sorted_runs(bank, row_index([1, 0, 1, 2, 1], CPU))
    assert [count for count, _ in runs] == [1, 3, 1] and order.tolist() == [1, 0, 2, 4, 3] and back.tolist() == [1, 0, 2, 4, 3]
    assert [(count, lines.stop - lines.start) for count, lines in batched._runs(bank, row_index([1, 1, 0, 1], CPU))] == [
        (2, 3), (1, 2), (1, 3)]


# -- a diverged adapter -------------------------------------------------------------------------------------------------------
FAST = {name: 1.0 + n for n, name in enumerate(KERNELS)}  # stacked is the quickest


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", [0, 1], ids=["B", "A"])
def test_a_diverged_adapter_reaches_no_other_row(table, tmp_path, broken, factor):
    table([(("factors", "float32", 4, 2, 2, 3, IN, OUT), FAST)], tmp_path / "table.json")
    pairs, numbers = pairs_of("factors", [3, 2]), [0, 1, 0, 1]
    x, index = torch.randn(4, 2, IN), row_index(numbers, CPU)
    with torch.no_grad():
        healthy = Bank.of(pairs, (OUT, IN), torch.float32)
        assert kernel_for(x, index, healthy) == "stacked"
        wanted = change_of_rows(x, index, healthy)
        pairs[1][factor][0, 0] = broken
        got = change_of_rows(x, index, Bank.of(pairs, (OUT, IN), torch.float32))
    assert not got[1].isfinite().all() and not got[3].isfinite().all()
    close(got[::2], wanted[::2], 1e-6)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "stacked"])
def test_a_broken_row_spoils_no_other_adapters_gradient(name, table, tmp_path):
    table([(("factors", "float32", 4, 2, 2, 3, IN, OUT), FAST)], tmp_path / "table.json")
    pairs = [(B.requires_grad_(), A.requires_grad_()) for B, A in pairs_of("factors", [3, 2])]
    x = torch.randn(5, 2, IN)
    x[0, 0, 0] = float("inf")
    bank, index = Bank.of(pairs, (OUT, IN), torch.float32), row_index([0, 1, 0, 0, 1], CPU)
    assert kernel_for(x, index, bank) == "gathered", "stacked, the quickest here, sums over all rows"
    KERNELS[name](x, index, bank).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in pairs[1]) and not pairs[0][1].grad.isfinite().all()


# -- the choice ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_choice_is_the_measured_best():
    measured = batched.measured()
    names, rows = measured["columns"][8:], measured["rows"]
    assert set(names) == set(KERNELS) and len({tuple(row[:8]) for row in rows}) == len(rows) > 500
    for kind, dtype, *sizes in rows:
        sizes, times = sizes[:6], {name: time for name, time in zip(names, sizes[6:]) if time is not None}
        best = choose(*sizes, getattr(torch, dtype), CPU, kind=kind)
        assert times[best] == min(times.values())
        assert choose(*sizes, getattr(torch, dtype), CPU, kind=kind) == best
    assert len({choose(*row[2:8], torch.float32, CPU, kind=row[0]) for row in rows}) > 1, "one kernel everywhere needs no table"


def test_the_nearest_point_decides(table, tmp_path):
    def point(*sizes, kind="factors"):
        return (kind, "float32", *sizes)

    slow = dict(FAST, stacked=9.0)
    table([(point(4, 1, 4, 8, 64, 64), FAST), (point(4, 64, 4, 8, 64, 64), {"gathered": 5.0, "looped": 4.0}),
           (point(4, 1, 4, 64, 64, 64), dict(slow, gathered=8.0, grouped=8.0)), (point(4, 1, 4, 8, 64, 64, kind="columns"), slow)],
          tmp_path / "table.json")
    assert choose(5, 1, 3, 9, 80, 60, torch.float32, CPU) == "stacked"
    assert choose(5, 7, 3, 9, 80, 60, torch.float32, CPU) == "stacked" and choose(5, 9, 3, 9, 80, 60, torch.float32, CPU) == "looped"
    assert choose(4, 1, 4, 8, 64, 64, torch.float64, CPU) == "stacked", "a dtype that was not measured goes by fp32"
    assert choose(4, 1, 4, 8, 64, 64, torch.float32, torch.device("cuda")) == DEFAULT
    assert choose(4, 1, 4, 8, 64, 64, torch.float32, CPU, kind="columns") == "gathered"
    assert choose(4, 1, 4, 8, 64, 64, torch.float32, CPU, among=("gathered", "grouped", "segmented", "looped")) == "gathered"
    # one wide adapter among narrow ones: gathering pads all of them
    assert choose(4, 1, 4, 8, 64, 64, torch.float32, CPU, widest=64, among=("gathered", "grouped", "segmented", "looped")) == "segmented"
    assert choose(0, 0, 0, 8, 64, 64, torch.float32, CPU) == "stacked"


def test_a_full_group_among_empty_ones_is_not_padded(table, tmp_path):
    table([(("factors", "float32", rows, 1, 2, 3, IN, OUT), {"grouped": float(rows), "looped": 9.0}) for rows in (8, 16)],
          tmp_path / "table.json")
    assert choose(8, 1, 2, 3, IN, OUT, torch.float32, CPU) == choose(8, 1, 2, 3, IN, OUT, torch.float32, CPU, fullest=4) == "grouped"
    assert choose(8, 1, 2, 3, IN, OUT, torch.float32, CPU, fullest=7) == "looped"
    x, bank = torch.randn(8, 1, IN), Bank.of(pairs_of("factors", [3, 3]), (OUT, IN), torch.float32)
    assert kernel_for(x, row_index([0, 1] * 4, CPU), bank) == "grouped"
    assert kernel_for(x, row_index([0] * 7 + [1], CPU), bank) == "looped"


def test_whole_groups_in_order_copy_nothing():
    bank = Bank.of(pairs_of("factors", [3, 3]), (OUT, IN), torch.float32)
    index = row_index([0, 0, 1, 1], CPU)
    assert bank.made_of(index, batched._groups) == ([0, 1], None, None)
    assert all(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
               for a, b in zip(bank.made_of(index, batched._by_group), (bank.A, bank.B)))
    present, places, back = bank.made_of(row_index([1, 0, 1], CPU), batched._groups)
    assert present == [0, 1] and places.tolist() == [1, 1, 0, 2] and back.tolist() == [2, 0, 3]


def test_what_is_ruled_out(table, tmp_path):
    table([(("factors", "float32", 4, 2, 2, 3, IN, OUT), FAST)], tmp_path / "table.json")
    x, index, pairs = torch.randn(4, 2, IN), row_index([1, 0, 0, 1], CPU), pairs_of("factors", [3, 2, 2])
    with torch.no_grad():
        alone, two, three = (Bank.of(pairs[:n], (OUT, IN), torch.float32) for n in (1, 2, 3))
        assert kernel_for(x, index, two) == "stacked" and kernel_for(x, torch.zeros(4, dtype=torch.int64), alone) == "stacked"
        assert kernel_for(x, index, three) == "gathered", "stacked would multiply the absent adapter too"
        assert kernel_for(x, row_index([1] * 4, CPU), two) == "gathered"
        assert kernel_for(x[:0], index[:0], two) == DEFAULT
        gpu = torch.device("cuda")
        assert batched._pick(gpu, 4, 2, False, index, two) == DEFAULT
        assert batched._pick(gpu, 4, 2, False, index, alone) == "looped", "one adapter: two plain products, nothing is gathered"


def test_a_plan_takes_the_kernel_of_the_run(table, tmp_path):
    table([(("factors", "float32", 4, 2, 2, 3, IN, OUT), dict(FAST, segmented=0.5))], tmp_path / "table.json")
    pairs, numbers = pairs_of("factors", [3, 2]), [0, 1, 0, 1]
    real = kernel_for(torch.randn(4, 2, IN), row_index(numbers, CPU), Bank.of(pairs, (OUT, IN), torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        x, bank = torch.randn(4, 2, IN), Bank.of([tuple(map(mode.from_tensor, pair)) for pair in pairs], (OUT, IN), torch.float32)
        index = row_index(numbers, CPU)
        assert kernel_for(x, index, bank) == real == "segmented" and change_of_rows(x, index, bank).shape == (4, 2, OUT)
        unknown = torch.tensor(numbers)
        assert numbers_of(bank, unknown) is None and kernel_for(x, unknown, bank) == DEFAULT
        assert change_of_rows(x, unknown, bank).shape == (4, 2, OUT)


# -- the kernels of a GPU, which tests/extras/test_triton.py runs: here another function stands for them ---------------------------
@pytest.fixture
def stand_in(monkeypatch):
    """The CPU counts as a device of the Triton kernels, and this as what they compute; the calls are counted."""
    calls = []

    def add_change(y, x, index, bank, factors=None):
        calls.append(tuple(y.shape))
        for n, k in enumerate(index.tolist()):
            if k >= 0:
                change = batched.looped(x[n:n + 1], torch.tensor([k]), bank)[0] + (0 if bank.bias is None else bank.bias[k])
                y[n] += (change * (1 if factors is None else factors[n])).to(y.dtype)

    module = types.ModuleType("graftwork.adapters._triton_kernels")
    module.add_change = add_change
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_triton, "DEVICES", {"cpu"})
    monkeypatch.setattr(_triton, "_installed", lambda: True)
    return module, calls


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_sites_add_in_place_where_the_device_can(stand_in, monkeypatch, family):
    model = getattr(tiny, family)()
    attach(model, "lora", name="small", seed=1, r=2)
    attach(model, "lora", name="wide", seed=2, r=7, bias="lora_only").scale(0.5)
    attach(model, "paca", name="paca", seed=3)
    attach(model, "s2ft", name="rows", seed=4)
    attach(model, "miss", name="miss", seed=5)
    attach(model, "dora", name="dora", seed=6)
    attach(model, "lora", name="part", seed=7, target_modules=["q"])  # of gpt2 a slice of the fused map
    rows = ["small", None, "wide", "paca", "small", "rows", "miss", "part", "dora"]
    ids = tiny.tokens(len(rows), 3)
    module, calls = stand_in
    with graftwork.routing(model, rows):
        mixed = output(model, ids)
        assert (len(rows), 3, model.config.hidden_size) in calls, "in place: all rows of the site at once"
        counted = len(calls)
        monkeypatch.setattr(_triton, "DEVICES", {"cuda"})
        close(mixed, output(model, ids))
        assert len(calls) == counted, "a CPU never takes them"


@torch.no_grad()
def test_a_kernel_that_the_device_refuses_is_given_up(stand_in, caplog):
    model = tiny.llama()
    attach(model, "lora", name="a", seed=1)
    ids = tiny.tokens(2, 3)
    module, calls = stand_in

    def refused(*arguments):
        calls.append(())
        raise RuntimeError("no such instruction")

    module.add_change = refused
    with graftwork.routing(model, ["a", None]):
        mixed = output(model, ids)
        assert calls == [()] and _triton.DEVICES == set() and "no such instruction" in caplog.text
        close(mixed, output(model, ids))
    with graftwork.routing(model, ["a"]):
        close(mixed[:1], output(model, ids[:1]))
    assert calls == [()]


def test_learning_and_positions_of_outputs_take_other_kernels(stand_in):
    x = torch.randn(3, 1, IN)
    bank = Bank.of(pairs_of("factors", [2]), (OUT, IN), torch.float32)
    assert _triton.takes_triton(x, bank)
    assert not _triton.takes_triton(x.clone().requires_grad_(), bank)
    assert not _triton.takes_triton(x, Bank.of(pairs_of("outputs", [2]), (OUT, IN), torch.float32))
    assert not _triton.takes_triton(x, Bank.of([(B, A.requires_grad_()) for B, A in pairs_of("factors", [2])], (OUT, IN), torch.float32))


# -- the benchmark ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_batched", ROOT / "benchmarks" / "batched.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_table_and_page_are_what_was_measured(benchmark):
    raw = json.loads(benchmark.OUT.read_text())
    assert batched.TABLE.read_text() == benchmark.table(raw)
    assert benchmark.PAGE.read_text() == benchmark.page(raw)
    shapes = {(p["rows"], p["tokens"], p["distinct"], p["rank"]) for p in raw["points"] if p["kind"] == "factors"}
    assert {(r, t, d, k) for r in (1, 2, 4, 8, 16, 32, 64) for t in (1, 64) for d in (1, 2, 4, 8, 16, 32, 64) if d <= r
            for k in (4, 8, 16, 64)} <= shapes


@pytest.mark.parametrize("kind", ["factors", "columns", "outputs"])
def test_the_benchmark_times_every_kernel(benchmark, kind):
    found = benchmark.measure((kind, "float32", 4, 2, 2, 3, 16, 24), torch.zeros(8), 2)
    assert set(found["least"]) - {"merged"} == set(KERNELS) and all(time > 0 for time in found["least"].values())
    alone = benchmark.measure((kind, "float32", 4, 2, 1, 8, 16, 24), torch.zeros(8), 1)
    assert ("merged" in alone["least"]) == (kind == "factors")

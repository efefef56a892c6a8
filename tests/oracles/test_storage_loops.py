"""The loops that numba compiles: decoded values bit for bit those of PyTorch, products against float64, and when they are not used."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage import _compiled, _team
from graftwork.storage._packing import pack
from graftwork.storage.base import make_storage

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def kept(weight, method, **options):
    return make_storage(weight, method, make_config("storage", method, **options))


PROCESSORS = {"avx512": ("avx512f", "avx2"), "avx2": ("avx2",), "other": ()}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    """A kind of processor, of which this one can do no less."""
    loops = _compiled._loops()
    vectors = loops.vectors
    if not all(map(vectors._has, PROCESSORS[request.param])):
        pytest.skip("a processor without it")
    builders = (_compiled._product, loops.decoder, loops.product, vectors.spread, vectors.block)
    monkeypatch.setattr(vectors, "_has", PROCESSORS[request.param].__contains__)
    for builder in builders:
        builder.cache_clear()
    yield
    for builder in builders:
        builder.cache_clear()


def halves(codes, high_first):
    """The codes of bytes, one after the other."""
    return torch.stack([codes >> 4, codes & 15] if high_first else [codes & 15, codes >> 4], -1).view(-1)


def numbers(generator):
    return torch.randn(16, generator=generator)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 700), block=st.sampled_from([2, 32, 64, 256]), high_first=st.booleans(), seed=st.integers(0, 9))
def test_table_codes_are_decoded_bit_for_bit(processor, size, block, high_first, seed):
    generator = drawn(seed)
    codes = torch.randint(256, (-(-size // 2),), dtype=torch.uint8, generator=generator)
    scale, table = torch.randn(-(-size // block), generator=generator), numbers(generator)
    found = _compiled.decode_table(codes, scale, block, tuple(table.tolist()), torch.full((size,), torch.nan), high_first=high_first)
    assert torch.equal(found, table[halves(codes, high_first).int()][:size] * scale.repeat_interleave(block)[:size])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 17), out=st.integers(1, 9), run=st.sampled_from([16, 32]), runs=st.integers(1, 5), repeat=st.integers(1, 3),
       high_first=st.booleans(), seed=st.integers(0, 9))
def test_products_by_tables_are_those_of_float64(processor, rows, out, run, runs, repeat, high_first, seed):
    generator, columns, group = drawn(seed), run * runs, run * repeat
    codes, table = torch.randint(256, (out * columns // 2,), dtype=torch.uint8, generator=generator), numbers(generator)
    scale, x = torch.randn(-(-out * columns // group), generator=generator), torch.randn(rows, columns, generator=generator)
    found = _compiled.few_product(x, codes, 4, scale, 0, group, run, table=tuple(table.tolist()), high_first=high_first)
    dense = table.double()[halves(codes, high_first).int()] * scale.double().repeat_interleave(group)[: out * columns]
    expected, sizes = (f(x.double()) @ f(dense).view(out, columns).T for f in (torch.clone, torch.abs))
    assert (found.double() - expected).abs().max() < 1e-6 * sizes.max()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 90), group=st.sampled_from([16, 20, 64, 256]), seed=st.integers(0, 9))
def test_whole_codes_are_decoded_bit_for_bit(rows, columns, group, seed):
    generator, groups = drawn(seed), -(-rows * columns // group)
    codes = torch.randint(256, (rows * columns,), dtype=torch.uint8, generator=generator)
    scale, zero = torch.randn(groups, generator=generator), torch.randn(groups, generator=generator)
    found = _compiled.decode_whole(codes, scale, zero, group, torch.full((rows, columns), torch.nan))
    each = (value.repeat_interleave(group)[: rows * columns] for value in (zero, scale))
    assert torch.equal(found.view(-1), (codes.float() - next(each)) * next(each))


@settings(max_examples=80, deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 17), out=st.integers(1, 9), runs=st.integers(1, 5), repeat=st.integers(1, 3),
       whole=st.booleans(), kept_as=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 9))
def test_products_are_those_of_float64(bits, rows, out, runs, repeat, whole, kept_as, seed):
    """Groups of one run, and of several that run over the ends of rows, the last one short."""
    generator, run = drawn(seed), 32
    columns, group = runs * run, run * repeat
    raw, groups = torch.randint(2**bits, (out, columns), dtype=torch.uint8, generator=generator), -(-out * columns // group)
    scale, x = torch.rand(groups, generator=generator) + 0.1, torch.randn(rows, columns, generator=generator)
    zero = 2 ** (bits - 1) if whole else torch.randn(groups, generator=generator).to(kept_as)
    scale = scale.to(kept_as)
    assert _compiled.suits(x[:16], bits, run)
    found = _compiled.few_product(x, pack(raw, bits).view(-1), bits, scale, zero, group, run)

    def each(value):
        return value.double().repeat_interleave(group)[: out * columns].view(out, columns)

    dense = (raw.double() - (zero if whole else each(zero))) * each(scale)
    largest = (x.double().abs() @ (raw.double().abs() + 2**bits).mul(each(scale)).T).max()
    assert (found.double() - x.double() @ dense.T).abs().max() < 1e-6 * largest


@pytest.fixture
def shared(monkeypatch):
    """Every loop in three threads."""
    monkeypatch.setattr(_compiled, "SHARE", 1)
    torch.set_num_threads(3)
    if not _team.has_all():
        pytest.skip("PyTorch's OpenMP is not one of those that are known")


def results(bits):
    """Of every loop, with numbers of parts that threads do not divide."""
    generator = drawn(bits)
    codes, x = torch.randint(256, (37, 64), dtype=torch.uint8, generator=generator), torch.randn(5, 64 * 8 // bits, generator=generator)
    scale, zero, flat = torch.rand(37, generator=generator), torch.rand(37, generator=generator), codes.view(-1)
    group, table = 64 * 8 // bits, tuple(numbers(generator).tolist())
    found = [_compiled.few_product(rows, flat, bits, scale, zeros, group, group) for rows in (x, x[:1]) for zeros in (3, zero)]
    if bits == 4:
        found += [_compiled.few_product(rows, flat, 4, scale, 0, group, group, table=table) for rows in (x, x[:1])]
        found.append(_compiled.decode_table(flat, scale, group, table, torch.empty(37 * group)))
    return [*found, _compiled.decode_whole(flat, scale, zero, 64, torch.empty(37, 64))]


def same(found, expected):
    return all(map(torch.equal, found, expected))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_threads_share_a_loop(bits, shared):
    teams = []
    torch.set_num_threads(1)
    alone = results(bits)
    torch.set_num_threads(3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_team, "openmp", lambda real=_team.openmp(): teams.append(1) or real)
        assert same(results(bits), alone) and teams
    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(lambda _: same(results(bits), alone), range(40)))


def test_a_loop_runs_in_as_many_threads_as_pytorch_has(shared):
    import numba

    number, numbers, seen = _team.openmp()[1], _compiled._loops()._floats, torch.zeros(3)

    @numba.cfunc(numba.types.void(numba.types.CPointer(numba.types.int64)), nopython=True)
    def loop(job):
        numbers(job, 0)[number()] += 1

    _team.run(_team.Loop(loop.address), [seen.data_ptr(), 3], 3)
    assert seen.tolist() == [1, 1, 1]


def _in_child(queue, codes, scale):
    queue.put((_team.has_all(), _compiled.few_product(torch.ones(2, 64), codes, 8, scale, 0, 64, 64).sum().item()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_without_the_threads_that_it_has_not(shared):
    codes, scale = torch.ones(640, dtype=torch.uint8), torch.ones(10)
    _compiled.few_product(torch.ones(2, 64), codes, 8, scale, 0, 64, 64)  # threads that a fork leaves behind
    context = get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = context.Process(target=_in_child, args=(queue, codes, scale))
        child.start()
    assert queue.get(timeout=60) == (False, 2 * 10 * 64)
    child.join(60)


def test_without_openmp_more_threads_are_pytorchs(monkeypatch):
    alone = results(4)
    monkeypatch.setattr(_team, "openmp", lambda: None)
    monkeypatch.setattr(_compiled, "SHARE", 1)
    assert _compiled.decodes(torch.ones(2)) and same(results(4), alone)
    torch.set_num_threads(3)
    assert not _compiled.decodes(torch.ones(2)) and not _compiled.suits(torch.ones(2, 64), 8, 64)


STORED = [("int8", {}), ("int8", {"group_size": 96}), ("int4", {}), ("int4", {"symmetric": True}), ("int2", {}), ("nf4", {}), ("fp4", {}),
          ("fp4", {"scale": "e4m3", "group_size": 16}), ("nf", {}), ("int4", {"group_size": -1})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method, options", STORED, ids=str)
def test_storages_give_the_same_with_and_without(method, options, dtype, monkeypatch):
    weight, x = torch.randn(33, 192, generator=drawn(1)).to(dtype), torch.randn(3, 192, generator=drawn(2)).to(dtype)
    storage, calls = kept(weight, method, **options), []
    for name in ("few_product", "decode_table", "decode_whole"):
        loop = getattr(_compiled, name)
        monkeypatch.setattr(_compiled, name, lambda *a, loop=loop, **k: calls.append(loop) or loop(*a, **k))
    many = torch.randn(200, 192, generator=drawn(3)).to(dtype)
    with torch.no_grad():
        found, dense, used = torch.cat([storage(x), storage(many)]), storage.dequantize(), bool(calls)
        monkeypatch.setattr(_compiled, "available", lambda: False)
        expected, without = torch.cat([storage(x), storage(many)]), storage.dequantize()
    assert used or dtype == torch.float64 and method in ("int4", "int2")
    assert torch.equal(dense, without)
    rtol, atol = (2e-2, 1e-1) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def test_where_loops_do_not_serve():
    x = torch.randn(2, 64)
    assert _compiled.serves(x) and _compiled.suits(x, 8, 64) and _compiled.decodes(x)
    assert not _compiled.suits(torch.randn(129, 64), 8, 64), "many rows"
    assert not _compiled.suits(x, 8, 24) and not _compiled.suits(x, 3, 64) and not _compiled.suits(x.double(), 8, 64)
    with forward_ad.dual_level():
        assert not _compiled.serves(x)
    with FakeTensorMode():
        assert not _compiled.serves(torch.randn(2, 64))
    torch.func.vmap(lambda row: row if not _compiled.serves(row) else pytest.fail("a loop would read a batched tensor"))(x)


def test_a_numba_that_cannot_be_imported_is_named_and_left_out(monkeypatch):
    def broken():
        raise ImportError("Numba needs another NumPy")

    monkeypatch.setattr(_compiled, "_loops", broken)
    _compiled.available.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Numba needs another NumPy"):
            assert not _compiled.available()
        with pytest.raises(UsageError, match="compute with numba"):
            kept(torch.randn(2, 64), "nf4", compute="numba")
    finally:
        _compiled.available.cache_clear()

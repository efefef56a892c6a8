"""The loops that numba compiles: decoded values bit for bit those of PyTorch, products against float64, and when they are not used."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage import _compiled, nf4
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


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), block=st.sampled_from([2, 32, 64, 256]), seed=st.integers(0, 9))
def test_pairs_are_decoded_bit_for_bit(size, block, seed):
    generator = drawn(seed)
    codes = torch.randint(256, (-(-size // 2),), dtype=torch.uint8, generator=generator)
    scale, pairs = torch.randn(-(-size // block), generator=generator), torch.randn(256, 2, generator=generator)
    found = _compiled.decode_pairs(codes, scale, block, pairs, torch.full((size,), torch.nan))
    assert torch.equal(found, pairs[codes.int()].view(-1)[:size] * scale.repeat_interleave(block)[:size])


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
       whole=st.booleans(), seed=st.integers(0, 9))
def test_products_are_those_of_float64(bits, rows, out, runs, repeat, whole, seed):
    """Groups of one run, and of several that run over the ends of rows, the last one short."""
    generator, run = drawn(seed), 32
    columns, group = runs * run, run * repeat
    raw, groups = torch.randint(2**bits, (out, columns), dtype=torch.uint8, generator=generator), -(-out * columns // group)
    scale, x = torch.rand(groups, generator=generator) + 0.1, torch.randn(rows, columns, generator=generator)
    zero = 2 ** (bits - 1) if whole else torch.randn(groups, generator=generator)
    assert _compiled.suits(x[:16], bits, run)
    found = _compiled.few_product(x, pack(raw, bits).view(-1), bits, scale, zero, group, run)

    def each(value):
        return value.double().repeat_interleave(group)[: out * columns].view(out, columns)

    dense = (raw.double() - (zero if whole else each(zero))) * each(scale)
    largest = (x.double().abs() @ (raw.double().abs() + 2**bits).mul(each(scale)).T).max()
    assert (found.double() - x.double() @ dense.T).abs().max() < 1e-6 * largest


def test_threads_share_a_product(monkeypatch):
    monkeypatch.setattr(_compiled, "SHARE", 64)
    generator = drawn(0)
    raw, scale = torch.randint(256, (37, 64), dtype=torch.uint8, generator=generator), torch.rand(37, generator=generator)
    x = torch.randn(5, 64, generator=generator)
    alone = _compiled.few_product(x, raw.view(-1), 8, scale, 128, 64, 64)
    torch.set_num_threads(3)
    with ThreadPoolExecutor(4) as callers:
        for found in callers.map(lambda _: _compiled.few_product(x, raw.view(-1), 8, scale, 128, 64, 64), range(40)):
            assert torch.equal(found, alone)


def _in_child(queue, codes, scale):
    torch.set_num_threads(2)
    queue.put(_compiled.few_product(torch.ones(2, 64), codes, 8, scale, 0, 64, 64).sum().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(_compiled, "SHARE", 64)
    codes, scale = torch.ones(640, dtype=torch.uint8), torch.ones(10)
    assert list(_compiled._pool().map(int, range(3))) == [0, 1, 2]  # threads that a fork leaves behind
    context = get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = context.Process(target=_in_child, args=(queue, codes, scale))
        child.start()
    assert queue.get(timeout=60) == 2 * 10 * 64
    child.join(60)


STORED = [("int8", {}), ("int8", {"group_size": 96}), ("int4", {}), ("int4", {"symmetric": True}), ("int2", {}), ("nf4", {}), ("fp4", {}),
          ("fp4", {"scale": "e4m3", "group_size": 16}), ("nf", {}), ("int4", {"group_size": -1})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method, options", STORED, ids=str)
def test_storages_give_the_same_with_and_without(method, options, dtype, monkeypatch):
    weight, x = torch.randn(33, 192, generator=drawn(1)).to(dtype), torch.randn(3, 192, generator=drawn(2)).to(dtype)
    storage, calls = kept(weight, method, **options), []
    for name in ("few_product", "decode_pairs", "decode_whole"):
        loop = getattr(_compiled, name)
        monkeypatch.setattr(_compiled, name, lambda *a, loop=loop: calls.append(loop) or loop(*a))
    many = torch.randn(20, 192, generator=drawn(3)).to(dtype)
    with torch.no_grad():
        found, dense, used = torch.cat([storage(x), storage(many)]), storage.dequantize(), bool(calls)
        monkeypatch.setattr(_compiled, "available", lambda: False)
        expected, without = torch.cat([storage(x), storage(many)]), storage.dequantize()
    assert used or dtype == torch.float64 and method in ("int4", "int2") or method == "nf4" and nf4._vector_code()
    assert torch.equal(dense, without)
    rtol, atol = (2e-2, 1e-1) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def test_where_loops_do_not_serve():
    x = torch.randn(2, 64)
    assert _compiled.serves(x) and _compiled.suits(x, 8, 64) and _compiled.decodes(x)
    torch.set_num_threads(2)
    assert _compiled.serves(x) and not _compiled.decodes(x)
    assert not _compiled.suits(torch.randn(17, 64), 8, 64), "many rows"
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

"""What the engine keeps and moves: adapters in the pool, banks beside it, one product a site and step, no copies of the pool."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graftwork
import tiny
from adapter_support import attach
from graftwork.adapters.slot import bank_bytes
from graftwork.errors import ArtifactError, IncompatibleError
from graftwork.registry import make_config
from graftwork.serving.engine import Engine, Request, Sampling, attention
from graftwork.serving.engine.adapters import AdapterFolder
from graftwork.storage import Storage
from graftwork.storage.base import apply_storage
from test_engine_methods import PIECES, Heard, agree, forced
from test_routing import count_products

pytestmark = pytest.mark.slow  # test_engine.py stands for the engine in make test-fast

PAGE = 4096  # bytes of 8 tokens in the tiny Llama


@pytest.fixture
def heard(monkeypatch):
    return Heard(monkeypatch)


def inside(pool, tensor):
    return pool.buffer.data_ptr() <= tensor.data_ptr() < pool.buffer.data_ptr() + pool.nbytes


# -- adapters in the pool ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["lora", "paca", "flora", "nola", "vera", "mixlora", "prompt", "prefix"])
def test_a_forward_reads_the_tensors_in_the_pool(method, tmp_path, heard):
    """What is written into an adapter's pages changes the answer as if the graft itself had been written."""
    model = tiny.llama()
    graft = attach(model, method, name="x")
    graft.save(tmp_path / "x")
    graft.detach()
    source, prompt = AdapterFolder(model, tmp_path), tiny.tokens(1, 9)[0].tolist()
    tensors = source.host(source.digest("x")).tensors
    with Engine(model, tiny.tokenizer(), pool_bytes=8 << 20, page_tokens=8, adapters=source, limits=PIECES) as engine:
        resident = engine.memory.resident(source.digest("x"))
        places = engine.pool.pack(source.sizes(resident.digest)).places
        loaded = dict(model.graft_state.grafts[resident.route].named_parameters(trainable=False))
        for place, (key, tensor) in zip(places, sorted(tensors.items())):
            piece = engine.pool.piece(resident.start, place, tensor.shape, tensor.dtype)
            assert torch.equal(piece, tensor) and loaded[key].data_ptr() == piece.data_ptr(), key
            if piece.is_floating_point():
                piece.mul_(1.5)
        request = Request("0", prompt, "x", Sampling(max_tokens=6, ignore_eos=True))
        engine.add(request)
        engine.run()
    graft = graftwork.attach_saved(model, tmp_path / "x", name="one")
    unwritten = forced(model, prompt, request.output)
    with torch.no_grad():
        for key, parameter in graft.named_parameters(trainable=False):
            if key in tensors and parameter.is_floating_point():
                parameter.mul_(1.5)
    wanted = forced(model, prompt, request.output)
    assert (wanted - unwritten).abs().max() > 1e-2
    agree(heard, request, wanted)


def test_memory_stays_flat_as_adapters_come_and_go(tmp_path):
    """60 turns through a pool with room for a few of 10 adapters: what has left is gone, and banks do not pile up."""
    model, prompt = tiny.llama(), tiny.tokens(1, 6)[0].tolist()
    kinds = ["lora", "paca", "flora", "nola", "vera"]
    for i in range(10):
        graft = attach(model, kinds[i % 5], name="x", seed=i)
        graft.save(tmp_path / f"a{i}")
        graft.detach()
    source, seen = AdapterFolder(model, tmp_path, host_bytes=200_000), []
    load = source.load

    def watched(digest, place):
        route, unload = load(digest, place)
        graft = model.graft_state.grafts[route]
        seen.append((digest, [weakref.ref(thing) for thing in (graft, *graft.adapters.values())]))
        return route, unload

    source.load = watched
    held, loads = [], 0
    with Engine(model, tiny.tokenizer(), pool_bytes=40 * PAGE, page_tokens=8, adapters=source) as engine:
        for turn in range(60):
            for i, name in enumerate([f"a{turn % 10}", None, f"a{(turn * 3 + 1) % 10}"]):
                engine.add(Request(f"{i}", prompt, name, Sampling(max_tokens=3)))
            engine.run()
            held.append(engine.bank_bytes())
            if turn % 12 == 11:
                gc.collect()
                alive = sum(any(ref() is not None for ref in refs) for _, refs in seen)
                assert alive == len(engine.memory.residents), (turn, alive, len(engine.memory.residents))
        assert engine.memory.evictions > 20 and sum(h.nbytes for h in source.hosts.values()) <= 200_000
        assert 0 < max(held[30:]) <= max(held[:30]), held
        loads = engine.memory.loads
    assert loads == len(seen) and not model.graft_state.grafts and bank_bytes(model) == 0
    gc.collect()
    assert not any(ref() is not None for _, refs in seen for ref in refs)


# -- products and bytes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_one_base_product_a_site_and_step(storage, monkeypatch):
    model = tiny.llama()
    apply_storage(model, make_config("storage", storage))
    names = ["lora", "vera", "nola", "paca", "small", "flora"]
    for i, name in enumerate(names):
        attach(model, "lora" if name == "small" else name, name=name, seed=i, **({"r": 1} if name == "small" else {}))
    counters, stored = count_products(model), [m for m in model.modules() if isinstance(m, Storage)]
    calls: list[int] = []
    if stored:
        plain = type(stored[0]).product
        monkeypatch.setattr(type(stored[0]), "product", lambda self, x, leaves=None: (calls.append(id(self)), plain(self, x, leaves))[1])
    for distinct in (1, 5, 6):
        with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, limits=PIECES) as engine:
            for i in range(8):
                name = None if i == 3 else names[i % distinct]
                engine.add(Request(f"{i}", tiny.tokens(1, 3 + i, seed=i)[0].tolist(), name, Sampling(max_tokens=4, ignore_eos=True)))
            while engine.busy:
                for counter in counters.values():
                    counter.rows.clear()
                calls.clear()
                before = engine.steps
                engine.step()
                assert engine.steps == before + 1
                tokens = {tuple(counter.rows) for counter in counters.values()}
                assert len(tokens) == 1 and len(min(tokens)) == 1, tokens
                assert distinct == 6 or min(tokens)[0] <= PIECES.max_tokens  # FLoRA's rows count r-fold
                assert sorted(calls) == sorted(id(m) for m in stored)


class Made(TorchDispatchMode):
    """Counts the bytes of all new tensors."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.bytes += sum(t.nbytes for t in tree_leaves(out)
                          if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given)
        return out


def decode(pages, scattered, monkeypatch):
    """(bytes of new tensors in a step that decodes three requests, whether each attention read its keys in the pool)."""
    model, seen = tiny.llama(), []
    attach(model, "lora", name="l")
    plain = attention.F.scaled_dot_product_attention
    with Engine(model, tiny.tokenizer(), pool_bytes=pages * PAGE, page_tokens=8) as engine:
        def looking(q, k, v, **options):
            seen.append(inside(engine.pool, k) and inside(engine.pool, v))
            return plain(q, k, v, **options)

        requests = [Request(f"{i}", tiny.tokens(1, 15, seed=i)[0].tolist(), name, Sampling(max_tokens=9, ignore_eos=True))
                    for i, name in enumerate(["l", None, "l"])]
        for request in requests:
            engine.add(request)
        for _ in range(2):
            engine.step()
        if scattered:  # somebody else takes the page behind each request
            for request in requests:
                engine.pool.take(1, "other", after=request.pages[-1])
        for _ in range(2):
            engine.step()
        assert all(len(request.pages) == 3 for request in requests)
        with monkeypatch.context() as patch, Made() as made:
            patch.setattr(attention.F, "scaled_dot_product_attention", looking)
            engine.step()
        engine.run()
    return made.bytes, seen


@pytest.mark.parametrize("scattered", [False, True])
def test_a_decode_step_copies_no_more_in_a_larger_pool(scattered, monkeypatch):
    """Requests that lie in one piece are read where they are; of others their own cells are copied."""
    (small, seen), (large, again) = (decode(pages, scattered, monkeypatch) for pages in (32, 2048))
    assert small == large > 0
    assert seen == again == [not scattered] * (3 * tiny.LAYERS)


# -- what is refused --------------------------------------------------------------------------------------------------------
def test_an_adapter_on_an_edited_base_fails_alone(tmp_path, heard):
    model, tokenizer = graftwork.load(tiny.save(tiny.llama(), tmp_path / "base"), storage="nf4", dtype="fp32")
    graft = graftwork.attach(model, "lora", name="x", r=4, initializer="pissa")
    assert graft.edited_storage
    graft.save(tmp_path / "adapters" / "x")
    graft.detach()
    prompt = tiny.tokens(1, 9)[0].tolist()
    with Engine(model, tokenizer, pool_bytes=8 << 20, page_tokens=8, adapters=AdapterFolder(model, tmp_path / "adapters")) as engine:
        broken, bare = (Request(f"{name}", prompt, name, Sampling(max_tokens=6, ignore_eos=True)) for name in ("x", None))
        for request in (broken, bare):
            engine.add(request)
        engine.run()
        assert isinstance(broken.error, IncompatibleError) and "edited base" in str(broken.error) and not broken.output
    agree(heard, bare, forced(model, prompt, bare.output))


def test_files_that_were_replaced_unannounced_are_not_served_as_the_old_ones(tmp_path):
    model, prompt = tiny.llama(), tiny.tokens(1, 9)[0].tolist()

    def save(seed):
        graft = attach(model, "lora", name="x", seed=seed)
        graft.save(tmp_path / "x")
        graft.detach()

    save(0)
    source = AdapterFolder(model, tmp_path)
    with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, adapters=source) as engine:
        def answer():
            request = Request("0", prompt, "x", Sampling(max_tokens=6, ignore_eos=True))
            engine.add(request)
            engine.run()
            return request

        first = answer()
        save(1)
        assert answer().output == first.output  # the old content is still at hand
        engine.memory.clear()
        source.hosts.clear()
        assert isinstance(answer().error, ArtifactError)
        source.refresh("x")
        second = answer()
        assert second.error is None and second.cached == 0 and second.output != first.output

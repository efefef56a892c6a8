"""Every servable method in the engine: a mixed batch in pieces equals the adapter attached alone in Transformers."""

import pytest
import torch

import graftwork
import tiny
from adapter_support import EVERYWHERE, attach, on_base
from graftwork.errors import IncompatibleError, UsageError
from graftwork.registry import lookup, methods
from graftwork.serving.engine import Engine, Limits, Request, Sampling
from graftwork.serving.engine import engine as engine_module
from graftwork.serving.engine.adapters import AdapterFolder
from graftwork.serving.generate import generate

pytestmark = pytest.mark.slow  # test_engine.py stands for the engine in make test-fast

METHODS = [info.name for info in methods("adapter")]
PREFIXES = ("prompt", "prefix", "lopa")
CENTRAL = (*EVERYWHERE, "vera", "dora", "mixlora", *PREFIXES)
NEW, PIECES = 6, Limits(chunk=3, max_tokens=8)


class Heard:
    """The logits from which each request's tokens were chosen."""

    def __init__(self, monkeypatch):
        self.logits: dict[str, list[torch.Tensor]] = {}
        choose = engine_module.choose

        def listening(logits, requests, *rest):
            for row, request in zip(logits, requests):
                self.logits.setdefault(request.id, []).append(row.clone())
            return choose(logits, requests, *rest)

        monkeypatch.setattr(engine_module, "choose", listening)

    def of(self, request):
        return torch.stack(self.logits[request.id])


@pytest.fixture
def heard(monkeypatch):
    return Heard(monkeypatch)


@torch.no_grad()
def forced(model, prompt, answer):
    """Logits before each token of an answer, by the model as it stands; a prefix that reads the prompt reads no answer."""
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.full_like(ids, -100)
    labels[:, len(prompt):] = ids[:, len(prompt):]
    with model.graft_state.scope(labels=labels):
        return model(ids).logits[0, len(prompt) - 1: -1]


def agree(heard, request, wanted):
    """Teacher-forced logits within 1e-4 relative; greedy tokens equal except where the two likeliest are closer than 1e-4."""
    assert request.error is None and len(request.output) == NEW, request
    got = heard.of(request)
    error = (got - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-4, (request.id, float(error))
    top = wanted.topk(2)
    for token, (first, second), gap in zip(request.output, top.indices.tolist(), (top.values[:, 0] - top.values[:, 1]).tolist()):
        assert token == first or (token == second and gap < 1e-4), (request.id, token, first, gap)


def saved(model, folder, **kinds):
    for name, method in kinds.items():
        graft = attach(model, method, name=name)
        graft.save(folder / name)
        graft.detach()


def serve(model, folder, names, prompts, **options):
    """The requests, answered together: the second half arrives while the first one is read."""
    requests = [Request(f"{i}", prompt, name, Sampling(max_tokens=NEW, ignore_eos=True))
                for i, (name, prompt) in enumerate(zip(names, prompts))]
    options = {"pool_bytes": 8 << 20, "limits": PIECES, **options}
    with Engine(model, tiny.tokenizer(), page_tokens=8, adapters=AdapterFolder(model, folder), **options) as engine:
        for request in requests[: len(requests) // 2]:
            engine.add(request)
        engine.step()
        for request in requests[len(requests) // 2:]:
            engine.add(request)
        engine.run()
        engine.memory.check()
    assert not model.graft_state.grafts and engine.pool.free == engine.pool.pages
    return requests


def check(heard, model, folder, names, prompts, requests):
    changes = {}
    for request, name, prompt in zip(requests, names, prompts):
        plain = forced(model, prompt, request.output)
        parts = () if name is None else ((name, 1.0),) if isinstance(name, str) else name
        grafts = [graftwork.attach_saved(model, folder / part, name=f"one{i}") for i, (part, _) in enumerate(parts)]
        for graft, (_, weight) in zip(grafts, parts):
            graft.scale(weight)
        wanted = forced(model, prompt, request.output)
        agree(heard, request, wanted)
        if isinstance(name, str) and parts not in changes and grafts[0].info.traits["mergeable"]:
            grafts[0].merge()
            agree(heard, request, forced(model, prompt, request.output))
        for graft in grafts:
            graft.detach()
        if parts:
            changes[parts] = float((wanted - plain).abs().max())
    assert min(changes.values()) > 1e-2, f"an adapter changes nothing: {changes}"


def mixed(heard, model, folder, method):
    saved(model, folder, x=method, y="lora")
    names = ["x", "y", None, "x", None, "x"]
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (11, 5, 9, 2, 1, 17)]
    check(heard, model, folder, names, prompts, serve(model, folder, names, prompts))


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in CENTRAL else [pytest.mark.slow]) for m in METHODS])
def test_every_method_in_a_mixed_batch(method, tmp_path, heard):
    mixed(heard, on_base(tiny.llama(), method, tmp_path), tmp_path, method)


@pytest.mark.parametrize("kind", [k for k in tiny.CAUSAL if k != "llama"])
@pytest.mark.parametrize("method", [*EVERYWHERE, *(pytest.param(m, marks=pytest.mark.slow) for m in ("mixlora", *PREFIXES))])
def test_on_other_kinds_of_models(method, kind, tmp_path, heard):
    mixed(heard, tiny.CAUSAL[kind](), tmp_path, method)


@pytest.mark.parametrize("method", ["lora", "paca", "vera"])
def test_on_a_base_in_four_bits(method, tmp_path, heard):
    model, _ = graftwork.load(tiny.save(tiny.llama(), tmp_path / "base"), storage="nf4", dtype="fp32")
    mixed(heard, model, tmp_path, method)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_trained_tokens_and_whole_modules_beside_an_adapter(method, tmp_path, heard):
    model = tiny.llama(tied=False)
    graft = attach(model, method, name="x", trainable_tokens=[5, 6, 7, 90], modules_to_save=["lm_head"])
    graft.save(tmp_path / "x")
    graft.detach()
    saved(model, tmp_path, y="lora")
    names, prompts = ["x", "y", None, "x"], [[5, 9, 90, 6, 40], [5, 9, 90, 6, 40], [5, 9, 90, 6, 40, 7], [7, 7, 8]]
    check(heard, model, tmp_path, names, prompts, serve(model, tmp_path, names, prompts))


# -- virtual tokens ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", PREFIXES)
def test_virtual_tokens_survive_preemption_and_are_shared_by_content(method, tmp_path, heard):
    """Pages of a prefix belong to the adapter's content; of one that reads the prompt, to the prompt as well."""
    model = tiny.llama()
    saved(model, tmp_path, x=method, y=method)
    with torch.no_grad():
        graft = attach(model, method, name="z", seed=9, num_virtual_tokens=13)
        graft.save(tmp_path / "z")
        graft.detach()
    long = tiny.tokens(1, 30)[0].tolist()
    prompts = [long, long, long[:20] + long[:4], long, long[:9], long]
    names = ["z", "z", "z", "x", "y", None]
    pages = 130 if method == "lopa" else 22  # a few more than the adapters take
    requests = serve(model, tmp_path, names, prompts, pool_bytes=pages * 4096, limits=Limits(chunk=5, optimism=4.0))
    assert method == "lopa" or sum(r.preempted for r in requests)
    check(heard, model, tmp_path, names, prompts, requests)
    source = AdapterFolder(model, tmp_path)
    assert source.digest("x") == source.digest("y") != source.digest("z")
    with Engine(model, tiny.tokenizer(), pool_bytes=8 << 20, page_tokens=8, adapters=source) as engine:
        cached = []
        for i, prompt in enumerate([long, long[:20], [5, *long], long]):
            request = Request(f"{i}", prompt, "z", Sampling(max_tokens=2))
            engine.add(request)
            engine.run()
            cached.append(request.cached)
        # z has 13 virtual tokens: with the first 3 of the text they fill two pages
        assert cached == ([0, 0, 0, 40] if method == "lopa" else [0, 32, 8, 40])


@pytest.mark.parametrize("method", PREFIXES)
def test_virtual_tokens_take_room_and_agree_with_generate(method):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    attach(model, method, name="p", num_virtual_tokens=3)
    attach(model, "lora", name="l")
    prompt = tiny.tokens(1, 250)[0].tolist()
    with Engine(model, tokenizer, pool_bytes=1 << 20, page_tokens=8) as engine:
        with pytest.raises(UsageError, match="254 tokens behind 3 virtual ones, the model's context 256"):
            engine.add(Request("0", prompt + prompt[:4], "p"))
        requests = [Request(f"{i}", prompt[:n], name, Sampling(max_tokens=20, ignore_eos=True))
                    for i, (name, n) in enumerate([("p", 250), (None, 250), ("l", 30), ("p", 7)])]
        for request in requests:
            engine.add(request)
        engine.run()
    assert [len(r.output) for r in requests] == [3, 6, 20, 20]
    for request in requests[2:]:
        answer = generate(model, tokenizer, [request.prompt], adapters=[request.adapter], max_new_tokens=20, gaps=True)[0]
        same = [a == b or gap < 1e-4 for a, b, gap in zip(answer.ids, request.output, answer.gaps)]
        assert same and all(same), (answer.ids, request.output)


def test_a_prefix_that_cannot_be_made_fails_its_own_request(tmp_path, heard, monkeypatch):
    model, prompt = tiny.llama(), tiny.tokens(1, 9)[0].tolist()
    saved(model, tmp_path, x="lopa")

    def broken(self, prompts, base):
        raise UsageError("the encoder is gone", remedy="bring it back")

    monkeypatch.setattr(lookup("adapter", "lopa").cls, "prefix", broken)
    with Engine(model, tiny.tokenizer(), pool_bytes=8 << 20, page_tokens=8, adapters=AdapterFolder(model, tmp_path)) as engine:
        bad, bare = (Request(f"{name}", prompt, name, Sampling(max_tokens=NEW, ignore_eos=True)) for name in ("x", None))
        for request in (bad, bare):
            engine.add(request)
        engine.run()
        engine.memory.check()
    assert bad.finish_reason == "error" and "encoder is gone" in str(bad.error) and not bad.output
    agree(heard, bare, forced(model, prompt, bare.output))


# -- sums -------------------------------------------------------------------------------------------------------------------
def seeded(model, folder, **kinds):
    """Like `saved`, no two with the same numbers."""
    for i, (name, method) in enumerate(kinds.items()):
        graft = attach(model, method, name=name, seed=i)
        graft.save(folder / name)
        graft.detach()


@pytest.mark.parametrize("first, second, kind", [("lora", "lora", "llama"), ("lora", "paca", "gpt2"), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in
    [("nola", "loha", "llama"), ("kasa", "lora", "llama"), ("lora", "paca", "llama"), ("lora", "paca", "mixtral")])])
def test_a_weighted_sum_equals_the_grafts_attached_together(first, second, kind, tmp_path, heard):
    model = tiny.CAUSAL[kind]()
    seeded(model, tmp_path, x=first, y=second, z="flora")
    whole, twice = (("x", 0.7), ("y", -1.5)), (("y", 0.5), ("x", 0.25), ("x", 0.5))
    names = [whole, "x", None, "z", whole, twice, "y"]
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (11, 5, 9, 7, 2, 17, 4)]
    check(heard, model, tmp_path, names, prompts, serve(model, tmp_path, names, prompts))


def test_a_sum_has_a_prefix_cache_of_its_own_and_refuses_what_does_not_add(tmp_path):
    model = tiny.llama()
    seeded(model, tmp_path, x="lora", y="paca", z="flora", p="prompt", m="mixlora")
    prompt = tiny.tokens(1, 20)[0].tolist()
    with Engine(model, tiny.tokenizer(), pool_bytes=8 << 20, page_tokens=8, adapters=AdapterFolder(model, tmp_path)) as engine:
        cached = []
        for i, name in enumerate(["x", [("x", 1.0), ("y", 1.0)], [("x", 1.0), ("y", 2.0)], [("x", 1.0), ("y", 1.0)]]):
            request = Request(f"{i}", prompt, name, Sampling(max_tokens=2))
            engine.add(request)
            engine.run()
            cached.append(request.cached)
        assert cached == [0, 0, 0, 16]
        for other, words in [("z", "changes the frozen product"), ("p", "virtual tokens"), ("m", "routes tokens")]:
            with pytest.raises(IncompatibleError, match=words):
                engine.add(Request("a", prompt, [("x", 0.5), (other, 0.5)]))
        for wrong in ([], [("x", float("nan"))], [("x",)], [(1, 2)]):
            with pytest.raises(UsageError, match="no sum of adapters"):
                engine.add(Request("a", prompt, wrong))
        assert not engine.busy
    attach(model, "lora", name="l")
    attach(model, "flora", name="f")
    with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8) as engine:
        engine.add(Request("a", prompt, [("l", 2.0)], Sampling(max_tokens=2)))
        engine.run()
        with pytest.raises(IncompatibleError, match="frozen product"):
            engine.add(Request("b", prompt, [("l", 0.5), ("f", 0.5)]))

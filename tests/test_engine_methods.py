"""Every servable method in the engine: a mixed batch in pieces equals the adapter attached alone in Transformers."""

import pytest
import torch

import graftwork
import tiny
from adapter_support import EVERYWHERE, attach
from graftwork.registry import methods
from graftwork.serving.engine import Engine, Limits, Request, Sampling
from graftwork.serving.engine import engine as engine_module
from graftwork.serving.engine.adapters import AdapterFolder

METHODS = [info.name for info in methods("adapter")]
CENTRAL = (*EVERYWHERE, "vera", "dora", "mixlora", "prompt", "prefix", "lopa")
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
    bare = {}
    for request, name, prompt in zip(requests, names, prompts):
        plain = forced(model, prompt, request.output)
        if name is None:
            agree(heard, request, plain)
            continue
        graft = graftwork.attach_saved(model, folder / name, name="one")
        wanted = forced(model, prompt, request.output)
        graft.detach()
        bare[name] = float((wanted - plain).abs().max())
        agree(heard, request, wanted)
    assert min(bare.values()) > 1e-2, f"an adapter changes nothing: {bare}"


def mixed(heard, model, folder, method):
    saved(model, folder, x=method, y="lora")
    names = ["x", "y", None, "x", None, "x"]
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (11, 5, 9, 2, 1, 17)]
    check(heard, model, folder, names, prompts, serve(model, folder, names, prompts))


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in CENTRAL else [pytest.mark.slow]) for m in METHODS])
def test_every_method_in_a_mixed_batch(method, tmp_path, heard):
    mixed(heard, tiny.llama(), tmp_path, method)


@pytest.mark.parametrize("kind", [k for k in tiny.CAUSAL if k != "llama"])
@pytest.mark.parametrize("method", [*EVERYWHERE, pytest.param("mixlora", marks=pytest.mark.slow)])
def test_on_other_kinds_of_models(method, kind, tmp_path, heard):
    mixed(heard, tiny.CAUSAL[kind](), tmp_path, method)


@pytest.mark.parametrize("method", ["lora", "paca", "vera"])
def test_on_a_base_in_four_bits(method, tmp_path, heard):
    model, _ = graftwork.load(tiny.save(tiny.llama(), tmp_path / "base"), storage="nf4", dtype="fp32")
    mixed(heard, model, tmp_path, method)

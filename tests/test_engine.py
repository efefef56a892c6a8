"""The serving engine: any mix, order and chunking of requests gives what each request gets alone."""

import random

import pytest

import graftwork
import tiny
from graftwork.errors import UsageError
from graftwork.serving.engine import Engine, Limits, Request, Sampling
from graftwork.serving.generate import encode_prompt, generate
from test_generate import PROMPTS, stir

NAMES = ["a", None, "b", "c", "b", "a"]


def mixed(build="llama"):
    model = tiny.CAUSAL[build]()
    stir(graftwork.attach(model, "lora", r=4, name="a"))
    stir(graftwork.attach(model, "paca", r=3, name="b"))
    stir(graftwork.attach(model, "flora", r=2, name="c", target_modules="all-linear"))
    return model, tiny.tokenizer()


def alone(model, tokenizer, tokens=12):
    """Each prompt by Transformers' cache path, one at a time."""
    return [generate(model, tokenizer, [prompt], adapters=[name], max_new_tokens=tokens, gaps=True)[0]
            for prompt, name in zip(PROMPTS, NAMES)]


def serve(engine, tokenizer, order, tokens=12, **sampling):
    requests = [Request(f"r{i}", encode_prompt(tokenizer, PROMPTS[i]), NAMES[i], Sampling(max_tokens=tokens, **sampling)) for i in order]
    return requests


def equal(request, wanted):
    for step, (left, right) in enumerate(zip(request.output, wanted.ids)):
        if left != right:
            assert wanted.gaps[step] < 1e-4, (request.id, step, wanted.gaps[step])
            return
    assert tuple(request.output) == wanted.ids and request.text.text == wanted.text
    assert request.finish_reason == wanted.finish_reason


@pytest.mark.parametrize("build", tiny.CAUSAL)
@pytest.mark.parametrize("limits", [pytest.param(Limits(), id="whole", marks=pytest.mark.slow),
                                    pytest.param(Limits(chunk=3, max_tokens=8, max_running=4), id="chunks")])
def test_mixed_requests_equal_each_alone(build, limits):
    model, tokenizer = mixed(build)
    wanted = alone(model, tokenizer)
    with Engine(model, tokenizer, pool_bytes=1 << 20, page_tokens=8, limits=limits) as engine:
        requests = serve(engine, tokenizer, range(len(PROMPTS)))
        for request in requests[:2]:
            engine.add(request)
        engine.step()
        for request in requests[2:]:  # the others arrive while the first ones write
            engine.add(request)
        engine.run()
        engine.memory.check()
        for request, answer in zip(requests, wanted):
            equal(request, answer)
    again = alone(model, tokenizer)
    assert [a.ids for a in again] == [w.ids for w in wanted], "the model is not what it was before the engine"


@pytest.mark.slow
def test_preemption_prefixes_and_churn_change_nothing():
    model, tokenizer = mixed()
    wanted, draw = alone(model, tokenizer), random.Random(0)
    page = 2 * tiny.LAYERS * tiny.KV_HEADS * (tiny.HIDDEN // tiny.HEADS) * 4 * 8
    with Engine(model, tokenizer, pool_bytes=12 * page, page_tokens=8, limits=Limits(chunk=5, optimism=3.0)) as engine:
        preempted = cached = 0
        for _ in range(6):
            order = draw.sample(range(len(PROMPTS)), len(PROMPTS))
            requests = serve(engine, tokenizer, order)
            for request in requests:
                engine.add(request)
                if draw.random() < 0.5:
                    engine.step()
                    engine.memory.check()
            victim = engine.cancel(requests[-1].id) and requests[-1]
            engine.run()
            engine.memory.check()
            for request, i in zip(requests, order):
                if request is not victim:
                    equal(request, wanted[i])
            preempted += sum(r.preempted for r in requests)
            cached += sum(r.cached for r in requests)
        assert preempted and cached, (preempted, cached)
        engine.memory.prefixes.clear()
        assert engine.pool.free == engine.pool.pages


def test_cached_prefixes_belong_to_one_adapter():
    model, tokenizer = mixed()
    prompt = encode_prompt(tokenizer, "the user and one more of these, the user and one more of these")
    names = ["a", None, "b", "a"]
    with Engine(model, tokenizer, pool_bytes=1 << 20, page_tokens=8) as engine:
        requests = []
        for i, name in enumerate(names):
            requests.append(Request(f"{i}", prompt, name, Sampling(max_tokens=6)))
            engine.add(requests[-1])
            engine.run()
        assert [r.cached > 0 for r in requests] == [False, False, False, True]
        assert requests[0].output == requests[3].output
    for request, name in zip(requests, names):
        assert tuple(request.output) == generate(model, tokenizer, [prompt], adapters=[name], max_new_tokens=6)[0].ids


def test_sampling_does_not_depend_on_the_batch():
    model, tokenizer = mixed()
    with Engine(model, tokenizer, pool_bytes=1 << 20, page_tokens=8) as engine:
        results = []
        for order in ([2], [0, 1, 2, 3], [3, 2]):
            requests = serve(engine, tokenizer, order, temperature=1.0, top_p=0.9, seed=7)
            for request in requests:
                engine.add(request)
            engine.run()
            results.append(next(r.output for r in requests if r.id == "r2"))
        assert results[0] == results[1] == results[2]


def test_what_can_never_run_is_refused():
    model, tokenizer = mixed()
    with Engine(model, tokenizer, pool_bytes=1 << 16, page_tokens=8) as engine:
        for request, words in [(Request("1", [], None), "empty"), (Request("2", [5] * 300, None), "context"),
                               (Request("3", [5], "zz"), "no graft named"), (Request("4", [5] * 200, None), "pages")]:
            with pytest.raises(UsageError, match=words):
                engine.add(request)


def saved_adapters(folder, model, count=6):
    """Artifacts a0, a1 ... of several methods and ranks; {name: method}."""
    kinds = [("lora", dict(r=4)), ("paca", dict(r=3)), ("flora", dict(r=2)), ("nola", dict(r=2, n_basis=16)), ("lora", dict(r=9)),
             ("vera", dict(r=8))]
    for i in range(count):
        method, options = kinds[i % len(kinds)]
        graft = graftwork.attach(model, method, name=f"a{i}", seed=i, **options)
        stir(graft, 0.1 + 0.01 * i)
        graft.save(folder / f"a{i}")
        graft.detach()


@pytest.mark.slow
def test_adapters_come_and_go_in_one_pool(tmp_path):
    from graftwork.serving.engine.adapters import AdapterFolder

    model, tokenizer = tiny.llama(), tiny.tokenizer()
    saved_adapters(tmp_path, model)
    prompt, wanted = encode_prompt(tokenizer, PROMPTS[2]), {}
    for i in range(6):
        graft = graftwork.attach_saved(model, tmp_path / f"a{i}", name="one")
        wanted[f"a{i}"] = generate(model, tokenizer, [prompt], adapters=["one"], max_new_tokens=8, gaps=True)[0]
        graft.detach()
    wanted[None] = generate(model, tokenizer, [prompt], max_new_tokens=8, gaps=True)[0]
    source, draw = AdapterFolder(model, tmp_path, host_bytes=100_000), random.Random(1)
    assert source.names() == [f"a{i}" for i in range(6)] and not source.reads
    with Engine(model, tokenizer, pool_bytes=200_000, page_tokens=8, adapters=source, limits=Limits(chunk=7)) as engine:
        for turn in range(5):
            requests = [Request(f"{turn}.{i}", prompt, draw.choice(list(wanted)), Sampling(max_tokens=8)) for i in range(8)]
            for request in requests:
                engine.add(request)
                engine.step()
                engine.memory.check()
            engine.run()
            for request in requests:
                equal(request, wanted[request.adapter])
        assert engine.memory.evictions and source.reads > 6, (engine.memory.evictions, source.reads)
    assert not model.graft_state.grafts and engine.pool.free == engine.pool.pages


def test_answers_follow_a_grammar():
    pytest.importorskip("llguidance")
    model, tokenizer = mixed()
    with Engine(model, tokenizer, pool_bytes=1 << 20, page_tokens=8) as engine:
        guided = Request("g", encode_prompt(tokenizer, PROMPTS[0]), "a", Sampling(max_tokens=40, guide={"regex": "(the|note)( x| one){2}"}))
        free = Request("f", encode_prompt(tokenizer, PROMPTS[0]), "a", Sampling(max_tokens=8))
        for request in (guided, free):
            engine.add(request)
        engine.run()
        with pytest.raises(UsageError, match="regex cannot be used"):
            engine.add(Request("bad", [5], None, Sampling(guide={"regex": "("})))
    import re
    assert re.fullmatch("(the|note)( x| one){2}", guided.text.text), guided.text.text
    assert tuple(free.output) == generate(model, tokenizer, [PROMPTS[0]], adapters=["a"], max_new_tokens=8)[0].ids

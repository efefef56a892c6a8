"""The engine with merged weights: the same answers, and a base that is never touched."""

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach
from graftwork.adapters.merged_copy import merge_beside, unmerge_beside
from graftwork.adapters.slot import Slot
from graftwork.errors import IncompatibleError
from graftwork.registry import make_config
from graftwork.serving.engine import Engine, Limits, Request, Sampling
from graftwork.serving.engine.adapters import AdapterFolder
from graftwork.serving.engine.merging import Merging
from graftwork.storage.base import apply_storage
from test_engine_methods import Heard, agree, forced, seeded
from test_merging import Eager

pytestmark = pytest.mark.slow


@pytest.fixture
def heard(monkeypatch):
    return Heard(monkeypatch)


class Turns(Merging):
    """Merges what has waited longest, changing in every step."""

    def choose(self, queue, able):
        self.turn = getattr(self, "turn", 0) + 1
        known = [content for content in dict.fromkeys(queue) if content and content not in self.refused and able(content)]
        return known[self.turn % len(known)] if known and self.turn % 3 else None


class Watched:
    """What every step of an engine ran: (content that was merged, adapters of its rows), and that the base's weights stay."""

    def __init__(self, engine):
        self.engine, self.steps = engine, []
        self.before = {name: p.detach().clone() for name, p in engine.model.named_parameters() if "graft" not in name}
        plain = engine.merging.ran

        def ran(step, *rest):
            self.steps.append((step.merged, {r.adapter for r, _ in step.work}, {r.resident and r.resident.digest for r, _ in step.work}))
            plain(step, *rest)
            self.untouched()

        engine.merging.ran = ran

    def untouched(self):
        for name, parameter in self.engine.model.named_parameters():
            assert "graft" in name or torch.equal(parameter, self.before[name]), name


def served(model, folder, names, prompts, rule, **options):
    """The requests, answered together; the rule replaces the engine's."""
    requests = [Request(f"{i}", prompt, name, Sampling(max_tokens=6, ignore_eos=True))
                for i, (name, prompt) in enumerate(zip(names, prompts))]
    with Engine(model, tiny.tokenizer(), page_tokens=8, adapters=AdapterFolder(model, folder), merge=True,
                **{"pool_bytes": 8 << 20, "limits": Limits(chunk=3, max_tokens=8), **options}) as engine:
        engine.merging = rule
        watched = Watched(engine)
        for request in requests:
            engine.add(request)
            engine.step()
            engine.memory.check()
        engine.run()
        kept = engine.merged_bytes()
    assert not model.graft_state.grafts and engine.merged_bytes() == 0
    return requests, watched.steps, kept


def check(heard, model, folder, requests):
    for request in requests:
        parts = () if request.adapter is None else ((request.adapter, 1.0),) if isinstance(request.adapter, str) else request.adapter
        grafts = [graftwork.attach_saved(model, folder / part, name=f"one{i}") for i, (part, _) in enumerate(parts)]
        for graft, (_, weight) in zip(grafts, parts):
            graft.scale(weight)
        agree(heard, request, forced(model, request.prompt, request.output))
        for graft in grafts:
            graft.detach()


@pytest.mark.parametrize("kind, methods, rule", [("llama", ("lora", "paca", "flora"), Turns), ("llama", ("lora", "paca", "flora"), Eager),
                                                 ("gpt2", ("lora", "vera", "dora"), Turns), ("mixtral", ("lora", "nola", "paca"), Turns)])
def test_answers_are_the_same_with_and_without(kind, methods, rule, tmp_path, heard):
    model = tiny.CAUSAL[kind]()
    seeded(model, tmp_path, **dict(zip("xyz", methods)))
    names = ["x", "y", None, "x", "z", "x", None, "y", "x"]
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (11, 5, 9, 2, 7, 17, 1, 6, 4)]
    requests, steps, kept = served(model, tmp_path, names, prompts, rule())
    check(heard, model, tmp_path, requests)
    merged = [adapters for content, adapters, _ in steps if content is not None]
    assert merged and len(merged) < len(steps) and kept > 0
    for content, adapters, digests in steps:  # whoever runs in a merged step has the adapter that is merged
        assert content is None or digests == {content} and None not in adapters
    assert rule is Eager or len({min(adapters) for adapters in merged}) == 3


def test_sums_and_whole_modules_are_merged_as_well(tmp_path, heard):
    model = tiny.llama(tied=False)
    seeded(model, tmp_path, x="lora", y="paca")
    graft = attach(model, "lora", name="w", seed=7, modules_to_save=["lm_head"])
    graft.save(tmp_path / "w")
    graft.detach()
    whole = (("x", 0.7), ("y", -1.5))
    names, prompts = [whole, "w", None, whole, "w"], [tiny.tokens(1, n, seed=n)[0].tolist() for n in (11, 5, 9, 4, 7)]
    rule = Turns()
    requests, steps, _ = served(model, tmp_path, names, prompts, rule)
    check(heard, model, tmp_path, requests)
    assert {whole, "w"} <= set().union(*(adapters for content, adapters, _ in steps if content)) and not rule.refused


@pytest.mark.parametrize("kind", tiny.CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "flora"])
def test_the_copies_are_what_merging_in_place_writes(kind, dtype, method):
    """Bit for bit, in the base's own type; `Graft.merge` is the other way to get there, and changes the base."""
    model = tiny.CAUSAL[kind](dtype=dtype)
    graft = attach(model, method, name="x")
    before = {name: p.clone() for name, p in model.named_parameters()}
    slots = {name: slot for name, slot in model.named_modules() if isinstance(slot, Slot)}
    nbytes = merge_beside("x", [(graft, 1.0)])
    copies = {name: slot.merged["x"] for name, slot in slots.items()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    graft.merge()
    for name, copy in copies.items():
        frozen = slots[name].frozen
        assert torch.equal(copy.dense(), frozen.dense()) and copy.dtype == dtype
        assert (copy.bias is None) == (frozen.bias is None) and (copy.bias is None or torch.equal(copy.bias, frozen.bias))
    assert nbytes == sum(slot.frozen.dense().nbytes + (0 if slot.frozen.bias is None else slot.frozen.bias.nbytes)
                         for slot in slots.values())
    graft.unmerge()
    unmerge_beside(model)
    assert not any(slot.merged for slot in slots.values()) and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_gpt2s_slices_of_a_fused_map(tmp_path, heard):
    model = tiny.gpt2()
    graft = attach(model, "lora", name="q", seed=3, target_modules=["q", "v"])
    graft.save(tmp_path / "q")
    graft.detach()
    requests, steps, _ = served(model, tmp_path, ["q", None, "q"], [[5, 6, 7, 8], [5, 6, 7, 8], [9, 8, 7]], Turns())
    check(heard, model, tmp_path, requests)
    assert any(content for content, *_ in steps)


@pytest.mark.parametrize("method, more, reason", [("mixlora", {}, "no weight change"), ("prompt", {}, "no weight change"),
                                                  ("lora", {"trainable_tokens": [5, 6]}, "rows of tokens")])
def test_what_cannot_be_merged_is_served_as_before(method, more, reason, tmp_path, heard):
    model = tiny.llama()
    graft = attach(model, method, name="x", **more)
    graft.save(tmp_path / "x")
    graft.detach()
    rule = Turns()
    requests, steps, kept = served(model, tmp_path, ["x", "x", None], [[5, 6, 7, 8], [5, 9], [7, 8]], rule)
    check(heard, model, tmp_path, requests)
    assert not any(content for content, *_ in steps) and kept == 0
    assert len(rule.refused) == 1 and reason in next(iter(rule.refused.values()))


def test_no_memory_for_the_copies_is_no_fault_of_the_requests(tmp_path, heard, monkeypatch):
    from graftwork.adapters import merged_copy

    model, made = tiny.llama(), merged_copy._merged_product
    seeded(model, tmp_path, x="lora")
    calls = []

    def full(slot, entries):
        calls.append(slot)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return made(slot, entries)

    monkeypatch.setattr(merged_copy, "_merged_product", full)
    rule = Turns()
    requests, steps, kept = served(model, tmp_path, ["x", None], [[5, 6, 7, 8], [7, 8]], rule)
    check(heard, model, tmp_path, requests)
    assert len(calls) == 3 and kept == 0 and list(rule.refused.values()) == ["no room"]
    assert not any(isinstance(m, Slot) and m.merged for m in model.modules())


def test_copies_follow_the_content_and_are_made_once(tmp_path, heard, monkeypatch):
    """A replaced adapter never runs on the old copy; going back and forth between the modes copies nothing again."""
    from graftwork.serving.engine import merged

    made, plain = [], merged.merge_beside
    monkeypatch.setattr(merged, "merge_beside", lambda route, parts: made.append(route) or plain(route, parts))
    model, prompt = tiny.llama(), tiny.tokens(1, 9)[0].tolist()
    seeded(model, tmp_path, x="lora")
    source = AdapterFolder(model, tmp_path)

    def answers(number, names):
        requests = [Request(f"{number}{i}", prompt, name, Sampling(max_tokens=6, ignore_eos=True)) for i, name in enumerate(names)]
        for request in requests:
            engine.add(request)
        engine.run()
        check(heard, tiny.llama(), tmp_path, requests)
        return requests

    with Engine(model, tiny.tokenizer(), pool_bytes=8 << 20, page_tokens=8, adapters=source, merge=True) as engine:
        engine.merging = Turns()
        first = answers(0, ["x", "x", None])
        assert len(made) == 1 and engine.merging.switches > 3
        weights = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("proj.weight"))
        assert engine.merged_bytes() == weights > 0
        graft = attach(tiny.llama(), "lora", name="x", seed=5)
        graft.save(tmp_path / "x")
        source.refresh("x")
        second = answers(1, ["x", None])
        assert len(made) == 2 and second[0].output != first[0].output and engine.merged_bytes() == weights
        engine.memory.clear()  # the adapter leaves the pool, and its copies with it
        assert engine.merged_bytes() == 0 and not any(isinstance(m, Slot) and m.merged for m in model.modules())


def test_attached_grafts_are_merged_on_the_engines_own_clock():
    """Steps of the virtual clock: merged ones take 1 s, others 2 s, so the rule's ratio is a half."""
    model, now = tiny.llama(), [0.0]
    attach(model, "lora", name="x")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, merge=True, clock=lambda: now[0]) as engine:
        forward = engine._forward

        def timed(step, merged):
            now[0] += 2.0 if merged is None else 1.0
            return forward(step, merged)

        engine._forward = timed
        engine.add(Request("b", [5, 6, 7, 8], None, Sampling(max_tokens=6, ignore_eos=True), arrived=0.0))
        engine.run()
        assert engine.merging.steps == 0  # the base alone
        engine.add(Request("x", [5, 6, 7, 8], "x", Sampling(max_tokens=6, ignore_eos=True), arrived=0.0))
        engine.run()
        assert engine.merging.steps == 6 and engine.merging.ratio == engine.merging.left == pytest.approx(0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_base_in_four_bits_refuses():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    apply_storage(model, make_config("storage", "nf4"))
    with pytest.raises(IncompatibleError, match="kept as nf4"):
        Engine(model, tokenizer, pool_bytes=1 << 20, merge=True)
    with Engine(model, tokenizer, pool_bytes=1 << 20) as engine:
        assert engine.merging is None and engine.merged_bytes() == 0


def test_the_verb_and_the_metrics(tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    from graftwork.cli.main import main
    from graftwork.serving.http import server

    model, apps = tiny.save(tiny.llama(), tmp_path / "base"), []
    monkeypatch.setattr(server, "run", lambda app, *rest, **options: apps.append(app))
    for options in (["--merge"], []):
        main(["serve", "--model", str(model), "--port", "0", "--pool", "1MiB", "--quiet", *options])
    with_merge, without = (app.state.service for app in apps)
    assert isinstance(with_merge.engine.merging, Merging) and without.engine.merging is None
    attach(with_merge.engine.model, "lora", name="x")
    with_merge.engine.add(Request("0", [5, 6, 7], "x", Sampling(max_tokens=3, ignore_eos=True)))
    with_merge.engine.run()
    shown = with_merge.metrics.text().decode()
    assert f"graftwork_merged_bytes {float(with_merge.engine.merged_bytes())}" in shown and with_merge.engine.merged_bytes()
    assert f"graftwork_merged_steps {float(with_merge.engine.merging.steps)}" in shown and with_merge.engine.merging.steps
    assert "graftwork_merged_bytes 0.0" in without.metrics.text().decode()

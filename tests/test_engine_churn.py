"""The engine under random life: requests, steps, cancellations, replaced adapters, evictions, merged steps; and what it leaves behind."""

import gc
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import graftwork
import tiny
from adapter_support import attach
from graftwork.errors import ArtifactError
from graftwork.serving.engine import Engine, Limits, Request, Sampling
from graftwork.serving.engine.adapters import AdapterFolder
from graftwork.serving.engine.memory import Memory
from graftwork.serving.engine.policies import POLICIES, make_policy
from graftwork.serving.engine.pool import LayerShape, Pool
from graftwork.serving.engine.scheduler import Scheduler
from graftwork.serving.generate import generate
from test_merging import Eager
from test_pool import FakeAdapters

pytestmark = pytest.mark.slow

PAGE = 2048  # bytes of 8 tokens in one layer of the tiny Llama
NAMES = {"a": "lora", "b": "paca", "c": "vera"}
NEW = 5


def small():
    return tiny.llama(num_hidden_layers=1)


class World:
    """Two versions of each adapter on disk, and what each answers to each prompt, alone and without the engine; made once."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="graftwork-churn-"))
        self.prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (3, 11)]
        self.prompts.append([*self.prompts[1][:9], 7, 8])  # a page in common
        self.answers, model = {}, small()
        for i, (name, method) in enumerate(NAMES.items()):
            for version in (0, 1):
                graft = attach(model, method, name="one", seed=2 * i + version)
                graft.save(self.folder / f"{name}{version}")
                self._answer(model, (name, version), "one")
                graft.detach()
        self._answer(model, (None, 0), None)

    def _answer(self, model, who, graft):
        for number, prompt in enumerate(self.prompts):
            self.answers[who, number] = generate(model, tiny.tokenizer(), [prompt], adapters=[graft], max_new_tokens=NEW, gaps=True)[0]


@pytest.fixture(scope="module", autouse=True)
def world():
    EngineChurn.world = World()
    yield
    shutil.rmtree(EngineChurn.world.folder)


class EngineChurn(RuleBasedStateMachine):
    world: World

    @initialize(pages=st.sampled_from([26, 60]), chunk=st.sampled_from([4, 64]), optimism=st.sampled_from([1.0, 4.0]), merge=st.booleans(),
                policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, pages, chunk, optimism, merge, policy):
        self.folder = Path(tempfile.mkdtemp(prefix="graftwork-churn-"))
        self.versions, self.count, self.there, self.whose = {}, 0, [], {}
        self.source = AdapterFolder(small(), self.folder, host_bytes=30_000)
        for name in NAMES:
            self.replace(name, 0)
        self.engine = Engine(self.source.model, tiny.tokenizer(), pool_bytes=pages * PAGE, page_tokens=8, adapters=self.source,
                             limits=Limits(chunk=chunk, max_running=5, optimism=optimism), policy=policy, merge=merge)
        if merge:
            self.engine.merging = Eager(patience=4.0)

    @rule(name=st.sampled_from([None, *NAMES]), number=st.sampled_from([0, 1, 2]))
    def add(self, name, number):
        request = Request(str(self.count), self.world.prompts[number], name, Sampling(max_tokens=NEW))
        self.count += 1
        self.engine.add(request)
        self.there.append((request, name, number))

    @rule(times=st.integers(1, 4))
    def steps(self, times):
        for _ in range(times):
            self.engine.step()
            for request, name, _ in self.there:  # an answer is written by the content that the name stood for when it began
                if request.output and request.id not in self.whose:
                    self.whose[request.id] = (name, 0 if name is None else self.contents[request.digest])

    @precondition(lambda self: self.there)
    @rule(which=st.integers(0, 1000))
    def cancel(self, which):
        request = self.there[which % len(self.there)][0]
        open_ = request.finish_reason is None
        assert self.engine.cancel(request.id) == open_
        assert request.finish_reason is not None and (not open_ or request.finish_reason == "abort")

    @rule(name=st.sampled_from(sorted(NAMES)), version=st.sampled_from([0, 1]))
    def replace(self, name, version):
        """Other weights under the same name. Whoever has begun ends with what he began with, even if it has to be read again."""
        place = self.folder / name
        if place.exists():
            shutil.rmtree(place)
        shutil.copytree(self.world.folder / f"{name}{version}", place)
        self.source.refresh(name)
        self.contents = getattr(self, "contents", {})
        self.contents[self.source.digest(name)] = version
        self.versions[name] = version

    @rule(pages=st.integers(1, 30))
    def evict(self, pages):
        self.engine.memory.give_way(pages)

    @invariant()
    def sound(self):
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.memory.check()  # every page has the users that the books name; used + free = total
        owners = [page for r in engine.memory.residents.values() for page in range(r.start, r.start + r.pages)]
        assert len(owners) == len(set(owners))
        assert set(engine.requests) == {r.id for r, *_ in self.there if r.finish_reason is None} == set(engine.texts)
        assert set(engine.memory.running) == {r.id for r in engine.scheduler.running}
        assert set(engine.model.graft_state.grafts) == {r.route for r in engine.memory.residents.values()}

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.busy:
                break
            self.steps(1)
        assert not self.engine.busy, "requests never ended"
        for request, _, number in self.there:
            if request.finish_reason == "abort":
                continue
            if request.finish_reason == "error":  # its content was replaced on disk, and had left the memory
                assert isinstance(request.error, ArtifactError) and "replaced" in str(request.error)
                continue
            wanted = self.world.answers[self.whose[request.id], number]
            for step, (got, want) in enumerate(zip(request.output, wanted.ids)):
                if got != want:
                    assert wanted.gaps[step] < 1e-4, (request.id, self.whose[request.id], step)
                    break
            else:
                assert tuple(request.output) == wanted.ids
        self.engine.memory.clear()
        assert self.engine.pool.free == self.engine.pool.pages and not any(self.engine.pool.owner)
        assert not self.engine.model.graft_state.grafts and self.engine.bytes_beside() == self.engine.merged_bytes() == 0
        self.engine.close()
        shutil.rmtree(self.folder)


TestEngineChurn = EngineChurn.TestCase
TestEngineChurn.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)


def test_who_comes_late_begins_before_the_others_end():
    """A long prompt in pieces: those that write go on in every step, and it gets its first token while they still do."""
    model = tiny.llama()
    attach(model, "lora", name="x")
    with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, limits=Limits(chunk=16, max_tokens=20)) as engine:
        first = [Request(f"{i}", tiny.tokens(1, 5, seed=i)[0].tolist(), [None, "x"][i % 2], Sampling(max_tokens=40, ignore_eos=True))
                 for i in range(4)]
        for request in first:
            engine.add(request)
        for _ in range(3):
            engine.step()
        late = Request("late", tiny.tokens(1, 100)[0].tolist(), "x", Sampling(max_tokens=3, ignore_eos=True))
        engine.add(late)
        steps = 0
        while not late.output:
            before = [len(r.output) for r in first]
            engine.step()
            steps += 1
            assert [len(r.output) for r in first] == [n + 1 for n in before]
        assert steps == 7 and all(r.finish_reason is None for r in first)  # 100 tokens, 16 a step beside the four that write
        engine.run()
        assert late.ended <= min(r.ended for r in first)


def test_nothing_is_left_of_ten_thousand_requests():
    """Scheduler, memory and pool without a model: random requests under every policy, cancelled, on adapters that are replaced."""
    draw, now = random.Random(0), [0.0]
    most = 0
    for turn, policy in enumerate(sorted(POLICIES)):
        source = FakeAdapters()
        pool = Pool([LayerShape(1, 2, 2), LayerShape(2, 1, 3)], 120, page_tokens=8)
        memory = Memory(pool, source, prefix_cache=turn % 2 == 0)
        scheduler = Scheduler(memory, Limits(max_running=24, max_tokens=256, chunk=32, optimism=[1.0, 3.0][turn % 2]),
                              make_policy(policy), lambda: now[0])
        merging = Eager(patience=8.0) if turn % 3 == 0 else None
        for name in "abcdefgh":
            source.replace(name, [draw.randint(1, 900) for _ in range(4)])
        there, made = [], 0
        while made < 2000 or there:
            while made < 2000 and len(there) < 60:
                name = draw.choice([None, *"abcdefgh"])
                r = Request(str(made), [1] * draw.randint(1, 20) + [draw.randint(2, 9)], name, Sampling(max_tokens=draw.randint(1, 12)),
                            tenant=name or "", arrived=now[0], deadline=draw.choice([None, 50.0]))
                made += 1
                there.append(r)
                scheduler.add(r)
            if draw.random() < 0.05:
                source.replace(draw.choice("abcdefgh"), [draw.randint(1, 900) for _ in range(4)])
            if there and draw.random() < 0.1:
                scheduler.finish(there.pop(draw.randrange(len(there))))
            now[0] += 1.0
            step = scheduler.step() if merging is None else merging.step(scheduler)
            gone = {*map(id, step.aborted), *(id(r) for r, _ in step.failed)}
            for r in [*step.aborted, *(r for r, _ in step.failed)]:
                scheduler.finish(r)
            for r, count in step.work:
                r.computed += count
                memory.computed(r)
                if r.computed == r.length:
                    r.output.append(1)
                    scheduler.policy.wrote(r, 1)
                    if r.remaining == 0:
                        scheduler.finish(r)
                        gone.add(id(r))
            if merging is not None and step.work:
                merging.ran(step, len(scheduler.running), 1.0)
            there = [r for r in there if id(r) not in gone]
            if made % 100 == 0:
                memory.check()
                most = max(most, pool.used)
        memory.clear()
        memory.check()
        assert pool.free == pool.pages and not any(pool.owner) and not memory.running and not memory.keys and not memory.residents
        assert not scheduler.waiting and not scheduler.running and not source.views
        assert merging is None or (merging.steps and len(merging.credits) <= 9)
    assert most > 110, "the pool was never full"


@pytest.fixture
def fleet(tmp_path):
    """100 adapters with contents of their own on one site each."""
    model = small()
    for i in range(100):
        method = ("lora", "vera", "paca", "nola", "randlora")[i % 5]
        graft = attach(model, method, name="x", seed=i, target_modules=["q_proj"])
        graft.save(tmp_path / f"n{i}")
        graft.detach()
    return tmp_path


def test_memory_is_flat_while_200_adapters_come_and_go(fleet):
    """What lies in the pool, beside it and on the host is the same for the last hundred as for the first."""
    model = small()
    source = AdapterFolder(model, fleet, host_bytes=60_000)
    pages, beside, alive = [], [], []
    with Engine(model, tiny.tokenizer(), pool_bytes=24 * PAGE, page_tokens=8, adapters=source) as engine:
        for i in range(200):
            engine.add(Request("0", [5, 6, 7], f"n{i % 100}", Sampling(max_tokens=2, ignore_eos=True)))
            engine.run()
            pages.append(engine.pool.used)
            if i % 3 == 0:  # coprime to the five methods
                beside.append(engine.bytes_beside())
            if i % 50 == 49:
                gc.collect()
                alive.append(sum(type(thing) is graftwork.Graft and thing.model is model for thing in gc.get_objects()))
        assert engine.memory.loads == 200 and engine.memory.evictions > 150
        assert max(pages) <= 24 and 0 < max(beside[33:]) <= max(beside[:33]), beside
        assert max(alive) <= len(engine.memory.residents) + 5, alive
        assert source.hosts.bytes <= 60_000
        engine.memory.clear()
        assert engine.bytes_beside() == 0


def test_bytes_beside_the_pool_are_those_that_methods_make(tmp_path):
    """Before anything runs: VeRA's pair, r (in + out) values, and nothing of a LoRA; with a bank there is more."""
    model = small()
    for name, method in (("l", "lora"), ("v", "vera")):
        graft = attach(model, method, name="x", target_modules=["q_proj", "down_proj"])
        graft.save(tmp_path / name)
        graft.detach()
    source = AdapterFolder(model, tmp_path)
    with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, adapters=source) as engine:
        engine.memory.resident(source.digest("l"))
        assert engine.bytes_beside() == 0
        engine.memory.resident(source.digest("v"))
        pair = 4 * 6 * (max(tiny.HIDDEN, tiny.FFN) + tiny.HIDDEN)
        assert engine.bytes_beside() == pair
        engine.add(Request("0", [5, 6], "l", Sampling(max_tokens=30, ignore_eos=True)))
        engine.run()
        assert engine.bytes_beside() == pair + engine.bank_bytes() > pair
    assert engine.bytes_beside() == 0

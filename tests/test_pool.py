"""Pages never leak, never have two owners, and what lies in them stays what it was, whatever comes and goes."""

import zlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graftwork.errors import ArtifactError
from graftwork.serving.engine.memory import Memory
from graftwork.serving.engine.policies import POLICIES, make_policy
from graftwork.serving.engine.pool import LayerShape, Pool
from graftwork.serving.engine.prefixes import Prefixes
from graftwork.serving.engine.request import Request, Sampling
from graftwork.serving.engine.scheduler import Limits, Scheduler

pytestmark = pytest.mark.slow  # test_engine.py stands for the engine in make test-fast

PAGES, SIZE = 24, 8
NAMES = ["a", "b", "c", "d"]


class FakeAdapters:
    """Contents that are sizes and one byte per tensor, which `load` writes wherever the pool says."""

    def __init__(self):
        self.names, self.contents, self.views, self.broken = {}, {}, {}, set()

    def replace(self, name, sizes):
        digest = f"{name}{len(self.contents)}"
        self.names[name], self.contents[digest] = digest, sizes

    def digest(self, name):
        return self.names[name]

    def sizes(self, digest):
        return self.contents[digest]

    def virtual(self, digest, prompt):
        return ()

    def load(self, digest, place):
        views = []
        for i, size in enumerate(self.contents[digest]):
            views.append((place(i, (size,), torch.uint8), (zlib.crc32(digest.encode()) + i) % 255 + 1))
        if digest in self.broken:
            raise ArtifactError("broken", remedy="mend it")
        for view, value in views:
            view.fill_(value)
        self.views[digest] = views
        return digest, lambda: self.views.pop(digest)

    def check(self):
        for digest, views in self.views.items():
            assert all(bool((view == value).all()) for view, value in views), f"the bytes of {digest} are not what they were"


def traces(digest, tokens):
    """What each token's cell has to hold: it depends on the adapter and on all tokens up to this one, as keys and values do."""
    value = zlib.crc32(digest.encode())
    for token in tokens:
        value = zlib.crc32(bytes([token]), value)
        yield float(value % 1_000_003)


class Churn(RuleBasedStateMachine):
    @initialize(optimism=st.sampled_from([1.0, 3.0]), chunk=st.sampled_from([3, 64]), budget=st.sampled_from([6, 64]),
                policy=st.sampled_from(sorted(POLICIES)), cache=st.booleans())
    def begin(self, optimism, chunk, budget, policy, cache):
        self.pool = Pool([LayerShape(1, 2, 2), LayerShape(2, 1, 3)], PAGES, page_tokens=SIZE)
        self.source, self.now, self.count = FakeAdapters(), 0.0, 0
        for i, name in enumerate(NAMES):
            self.source.replace(name, [400 * (i + 1), 300, 8])
        self.memory = Memory(self.pool, self.source, prefix_cache=cache)
        self.optimism = optimism
        self.scheduler = Scheduler(self.memory, Limits(max_running=6, max_tokens=budget, chunk=chunk, optimism=optimism),
                                   make_policy(policy), lambda: self.now)
        self.there, self.began = [], {}

    @rule(name=st.sampled_from([None, *NAMES]), start=st.sampled_from([1, 2]), common=st.integers(1, 40), own=st.integers(0, 12),
          answer=st.integers(1, 40), deadline=st.sampled_from([None, 5.0]))
    def add(self, name, start, common, own, answer, deadline):
        prompt = [start] * common + [3 + (self.count * 7 + i) % 5 for i in range(own)]
        request = Request(str(self.count), prompt, name, Sampling(max_tokens=answer), tenant=name or "", arrived=self.now,
                          deadline=deadline)
        self.count += 1
        if self.pool.pages_for(request.worst) + self.memory.adapter_pages(request) <= PAGES:
            self.there.append(request)
            self.scheduler.add(request)

    @rule(times=st.integers(1, 6))
    def steps(self, times):
        for _ in range(times):
            self.step()

    def step(self):
        self.now += 1.0
        step = self.scheduler.step()
        assert not (step.preempted and self.optimism == 1), "memory was promised that is not there"
        assert step.tokens <= self.scheduler.limits.max_tokens and len({id(r) for r, _ in step.work}) == len(step.work)
        for request in [*step.aborted, *(r for r, _ in step.failed)]:
            self.end(request)
        for request, count in step.work:
            digest = request.resident.digest if request.resident else ""
            assert not request.output or self.began[request.id] == digest, "an answer under two contents of its adapter"
            self.began[request.id] = digest
            values = list(traces(digest, request.tokens[: request.computed + count]))
            for at in range(request.computed, request.computed + count):
                cell = request.pages[at // SIZE] * SIZE + at % SIZE
                self.pool.keys[0][cell], self.pool.values[1][cell] = values[at], -values[at]
            request.computed += count
            self.memory.computed(request)
            if request.computed == request.length:
                request.output.append(len(request.output) % 3)
                request.first_token = self.now if request.first_token is None else request.first_token
                self.scheduler.policy.wrote(request, 1)
                if request.remaining == 0:
                    self.end(request)
        return step

    def end(self, request):
        self.scheduler.finish(request)
        self.there.remove(request)

    @precondition(lambda self: self.there)
    @rule(which=st.integers(0, 1000))
    def cancel(self, which):
        self.end(self.there[which % len(self.there)])

    @rule(name=st.sampled_from(NAMES), sizes=st.lists(st.integers(1, 1000), max_size=4), broken=st.booleans())
    def replace(self, name, sizes, broken):
        self.source.replace(name, sizes)
        if broken:
            self.source.broken.add(self.source.names[name])

    @rule(pages=st.integers(1, PAGES))
    def evict(self, pages):
        before = self.pool.free
        enough = self.memory.give_way(pages)
        assert enough == (self.pool.free - before >= pages)

    @invariant()
    def sound(self):
        if not hasattr(self, "memory"):
            return
        self.memory.check()
        self.source.check()
        for request in self.memory.running.values():
            cells = torch.tensor([request.pages[at // SIZE] * SIZE + at % SIZE for at in range(request.computed)], dtype=torch.long)
            wanted = torch.tensor(list(traces(request.resident.digest if request.resident else "", request.tokens[: request.computed])))
            assert torch.equal(self.pool.keys[0][cells][:, 0, 0], wanted) and torch.equal(self.pool.values[1][cells][:, 0, 0], -wanted)
        assert {r.id for r in self.scheduler.running} == set(self.memory.running)
        assert {id(r) for r in self.scheduler.running + self.scheduler.waiting} == {id(r) for r in self.there}

    def teardown(self):
        if not hasattr(self, "memory"):
            return
        for _ in range(20_000):
            if not self.there:
                break
            assert self.step() is not None
        assert not self.there, "requests never ended"
        self.memory.clear()
        self.memory.check()
        assert self.pool.free == PAGES and not self.source.views and not any(self.pool.owner)


TestChurn = Churn.TestCase
TestChurn.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_end_of_a_cached_prompt_goes_before_its_beginning():
    pool = Pool([LayerShape(1, 1, 1)], 8, page_tokens=SIZE)
    prefixes, tokens = Prefixes(pool), list(range(33))
    keys, pages = prefixes.keys("x", tokens), pool.take(4, "r")
    for full in range(1, 5):  # page by page, as they fill
        prefixes.publish(keys[:full], pages[:full])
    pool.give(pages)
    assert prefixes.idle() == 4 and prefixes.evict(1) == 1
    found = prefixes.adopt("x", tokens)
    assert found == pages[:3] and prefixes.idle() == 0 and prefixes.evict(4) == 0
    pool.give(found)
    assert prefixes.adopt("y", tokens) == []


def test_pages_move_out_of_the_way_of_an_adapter():
    pool, source = Pool([LayerShape(1, 1, 1)], 8, page_tokens=SIZE), FakeAdapters()
    memory = Memory(pool, source)
    source.replace("a", [64] * 4)
    requests = [Request(str(i), [i + 1] * SIZE, None, Sampling(max_tokens=1)) for i in range(8)]
    for i, request in enumerate(requests):
        assert memory.prepare(request) and memory.reserve(request, SIZE)
        pool.keys[0][request.pages[0] * SIZE: (request.pages[0] + 1) * SIZE] = i
        request.computed = SIZE
        memory.computed(request)
    requests.sort(key=lambda request: request.pages[0])
    for request in requests[::2]:
        memory.release(request)
    memory.prefixes.evict(8)
    assert pool.free == 4 and pool.take_run(2, "x") is None
    assert memory.resident("a0").pages == 4
    memory.check()
    source.check()
    for request in requests[1::2]:
        first = request.pages[0] * SIZE
        assert (pool.keys[0][first: first + SIZE] == int(request.id)).all()
        again = Request("again", [*request.prompt, 9], None, Sampling(max_tokens=1))
        assert memory.prepare(again) and again.pages == request.pages and again.cached == SIZE
        memory.release(again)

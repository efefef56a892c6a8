"""The scheduler and its policies on a virtual clock: what each promises, by hand-made cases, and on random and seeded traffic."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.errors import ArtifactError, UsageError
from graftwork.serving.engine.memory import Memory
from graftwork.serving.engine.policies import POLICIES, Clustered, EarlyAbort, Fair, Newest, make_policy
from graftwork.serving.engine.pool import LayerShape, Pool
from graftwork.serving.engine.request import Request, Sampling, Status
from graftwork.serving.engine.scheduler import Limits, Policy, Scheduler, worst_pages
from graftwork.serving.simulate import Machine, StepCost, lora_sizes, simulate
from graftwork.serving.workload import Record, Trace, group_sizes, metrics, trace, trace_per_adapter

pytestmark = pytest.mark.slow  # test_engine.py stands for the engine in make test-fast

# a model of 30 layers with 3 key heads of 64, q and v adapted; about the constants of one core
BIG = Machine(StepCost(0.030, 0.0008, 0.001, 2e-10), (LayerShape(3, 64, 64),) * 30, 512, lora_sizes([(576, 576), (576, 192)], 30))
SMALL = Machine(StepCost(1.0, 0.0), (LayerShape(1, 2, 2), LayerShape(1, 2, 2)), 40, lambda rank: [rank * 20] * 4, page_tokens=8)


def request(name, adapter=None, prompt=4, answer=4, arrived=0.0, **more):
    return Request(name, (1,) * prompt, adapter, Sampling(max_tokens=answer), arrived=arrived, **more)


def names(requests):
    return " ".join(r.id for r in requests)


def roomy(policy, limits=None, pages=1000, source=None, now=lambda: 0.0):
    pool = Pool([LayerShape(1, 1, 1)], pages, page_tokens=8, device="meta")
    return Scheduler(Memory(pool, source, prefix_cache=False), limits or Limits(), policy, now)


def compute(scheduler, step):
    """What the engine does with a step."""
    for r, count in step.work:
        r.computed += count
        if r.computed == r.length:
            r.output.append(1)
            scheduler.policy.wrote(r, 1)
            if not r.remaining:
                scheduler.finish(r)


# -- the bound of memory --------------------------------------------------------------------------------------------------------------
def state(length, left, answer_so_far=0):
    r = request("r", prompt=length - answer_so_far, answer=left + answer_so_far)
    r.output = [1] * answer_so_far
    return r


SHAPES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8)


@given(SHAPES, st.sampled_from([1, 8, 16]))
def test_the_bound_of_writing_requests_is_tight(shapes, size):
    most_pages = most = 0
    for step in range(max(left for _, left in shapes) + 1):  # step by step; who has reached its limit is gone
        held = [length + step for length, left in shapes if left >= step]
        most_pages = max(most_pages, sum(-(-tokens // size) for tokens in held))
        most = max(most, sum(held) + len(held) * (size - 1))
    bound = worst_pages([state(*shape) for shape in shapes], size)
    assert most_pages <= bound <= most / size


@given(SHAPES, SHAPES, st.sampled_from([1, 8]), st.randoms(use_true_random=False))
def test_the_bound_holds_whenever_prompts_get_through(writing, reading, size, draw):
    bound = worst_pages([state(*shape) for shape in writing], size, [state(*shape) for shape in reading])
    for _ in range(5):
        begin = [0] * len(writing) + [draw.randint(0, 80) for _ in reading]
        for step in range(142):
            held = [length + max(step - first, 0) for (length, left), first in zip(writing + reading, begin) if left >= step - first]
            assert sum(-(-tokens // size) for tokens in held) <= bound


def test_pages_of_a_common_prefix_count_once():
    requests = [state(40, 8) for _ in range(3)]
    alone = worst_pages(requests, 8)
    for i, r in enumerate(requests):
        r.cached, r.pages = 32, [0, 1, 2, 3, 10 + i]
    assert alone - worst_pages(requests, 8) == 8  # two of three hold four pages that are there anyway
    assert worst_pages([], 8, requests) == worst_pages(requests, 8)


@st.composite
def traffic(draw):
    count = draw(st.integers(1, 24))
    numbers = lambda low, high: np.array(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))  # noqa: E731
    return Trace(np.cumsum(numbers(0, 12) * 0.5), numbers(0, 5), numbers(1, 70), numbers(1, 70), (1, 5, 9), 1.0)


LIMITS = st.builds(Limits, max_running=st.sampled_from([2, 5, 50]), max_tokens=st.sampled_from([4, 20, 200]),
                   chunk=st.sampled_from([3, 64]))


@settings(max_examples=60)
@given(traffic(), LIMITS, st.sampled_from(sorted(POLICIES)), st.booleans())
def test_admission_on_the_worst_case_never_puts_anyone_back(load, limits, policy, cache):
    out = simulate(load, SMALL, policy=policy, limits=limits, prefix_cache=cache, slo=math.inf)
    assert out.preempted == 0 and out.metrics.finished == len(load)


def test_optimism_puts_requests_back_and_all_finish():
    load = trace(adapters=6, rate=2, duration=50, prompt=(8, 60), answer=(8, 60), ranks=(1, 5, 9))
    assert simulate(load, SMALL).preempted == 0
    results = {policy: simulate(load, SMALL, policy=policy, limits=Limits(optimism=4.0), slo=math.inf) for policy in POLICIES}
    assert all(out.preempted > 0 and out.metrics.finished == len(load) for out in results.values())


def test_a_prompt_that_is_read_slowly_is_counted_whole():
    scheduler = roomy(Policy(), Limits(chunk=3), pages=11)
    slow, other = request("slow", prompt=60, answer=5), request("other", prompt=3, answer=60)
    for r in (slow, other):
        scheduler.add(r)
    while scheduler.waiting or scheduler.running:
        step = scheduler.step()
        assert step.work and not step.preempted
        compute(scheduler, step)


def test_who_writes_gets_a_token_in_every_step():
    scheduler = roomy(Policy(), Limits(max_running=50, max_tokens=4, chunk=3))
    requests = [request(str(i), prompt=5, answer=6) for i in range(9)]
    for r in requests:
        scheduler.add(r)
    while scheduler.waiting or scheduler.running:
        wrote = {r.id: len(r.output) for r in scheduler.running if r.output}
        step = scheduler.step()
        assert len(scheduler.running) <= 4 and 0 < step.tokens <= 4
        compute(scheduler, step)
        assert all(len(r.output) == wrote[r.id] + 1 for r in requests if r.id in wrote)
    assert all(len(r.output) == 6 for r in requests)


# -- policies ---------------------------------------------------------------------------------------------------------------------------
def observed(cls, *args):
    """An object of a policy that notes (id, time) of every admission."""
    class Observed(cls):
        def order(self, waiting, running, now):
            self.now = now
            return super().order(waiting, running, now)

        def admitted(self, request):
            super().admitted(request)
            self.log.append((request.id, self.now))
    policy = Observed(*args)
    policy.log = []
    return policy


@settings(max_examples=40)
@given(traffic(), LIMITS)
def test_first_come_first_served_never_overtakes(load, limits):
    policy = observed(Policy)
    simulate(load, SMALL, policy=policy, limits=limits)
    assert [int(name) for name, _ in policy.log] == list(range(len(load)))


def test_newest():
    waiting = [request(name) for name in "abc"]
    assert names(Newest().order(waiting, [], 0.0)) == "c b a"
    waiting[0].preempted = 1
    assert names(Newest().order(waiting, [], 0.0)) == "a c b"


def test_clustered_keeps_to_its_adapters_and_passes_places_on():
    policy, running = Clustered(2, 2.0), [request("a0", "a"), request("b0", "b")]
    assert names(policy.order(running, [], 0.0)) == "a0 b0"
    for r in running:
        policy.admitted(r)
    waiting = [request(name, name[0]) for name in ("c1", "a1", "d1", "b1", "c2", "a2")]
    assert names(policy.order(waiting[1:2], running, 0.5)) == "a1"  # nobody else waits: by arrival
    assert names(policy.order(waiting, running, 1.0)) == "a1 b1 a2 c1 d1 c2"
    assert names(policy.order(waiting, running, 2.0)) == "c1 d1 c2 a1 b1 a2"  # the slices are over; the line is c, d, a, b
    policy.admitted(waiting[0])
    assert names(policy.order(waiting[1:], running, 3.0)) == "d1 c2 a1 b1 a2"  # d has not had its first one yet
    assert names(policy.order(waiting[1:], running, 4.0)) == "d1 a1 a2 b1 c2"  # d stays until it has; c made room for a
    assert names(policy.order([], [], 9.0)) == "" and not policy.places and not policy.line
    assert names(Clustered(8).order(waiting, running, 0.0)) == "c1 a1 d1 b1 c2 a2"  # below the limit: by arrival


class Sticky(Policy):
    """S-LoRA's rule alone, which starves."""

    def order(self, waiting, running, now):
        here = {r.adapter for r in running}
        return sorted(waiting, key=lambda r: r.adapter not in here)


def test_clustered_starves_nobody():
    arrivals, adapters = list(range(200)), [i % 2 for i in range(200)]  # three times what can be served
    arrivals.insert(40, 39)
    adapters.insert(40, 2)
    one = np.ones(201, dtype=np.int64)
    load = Trace(np.array(arrivals, dtype=float), np.array(adapters), 4 * one, 10 * one, (1,), 1.0)
    limits, waits = Limits(max_running=3), {}
    for policy in (observed(Sticky), observed(Clustered, 2, 20.0), observed(Policy)):
        simulate(load, SMALL, policy=policy, limits=limits)
        waits[type(policy).__mro__[1]] = dict(policy.log)["40"] - 39
    assert waits[Sticky] > 250 and waits[Policy] > 70, waits
    assert waits[Clustered] <= 1 * (2 + 1) * (20 + 11), waits  # k = 1, p = 2; room is there after 10 steps at most


@settings(max_examples=40)
@given(traffic(), st.integers(1, 3), st.sampled_from([0.0, 5.0, 40.0]), st.sampled_from([1, 3]))
def test_the_bound_of_clustered(load, distinct, cycle, most):
    class Timed(Clustered):
        """Notes when somebody stands in line."""

        def order(self, waiting, running, now):
            order = super().order(waiting, running, now)
            lines.append((now, bool(self.line)))
            return order

    lines = []
    policy = observed(Timed, distinct, cycle)
    out = simulate(load, SMALL, policy=policy, limits=Limits(max_running=most))
    admitted = dict(policy.log)
    spans = [(now, until) for (now, stands), (until, _) in zip(lines, lines[1:]) if stands]
    room = 1 + max(r.ended - admitted[r.id] for r in out.requests)
    others = len(set(load.adapters.tolist())) - 1
    for r in out.requests:
        before = [o for o in out.requests if o.adapter == r.adapter and int(o.id) < int(r.id) and admitted[o.id] >= r.arrived]
        waited = sum(max(min(until, admitted[r.id]) - max(now, r.arrived), 0.0) for now, until in spans)
        assert waited <= (len(before) + 1) * (others + 1) * (cycle + room)
        newer = [o for o in out.requests if int(o.id) > int(r.id) and admitted[o.id] < admitted[r.id]]
        assert not newer or waited, "overtaken although nobody stood in line"


def test_clustered_has_fewer_adapters_in_a_step():
    load = trace(adapters=30, rate=12, duration=30, prompt=(8, 64), answer=(8, 64), ranks=(8,))
    machine = Machine(BIG.cost, BIG.layers, 200, BIG.sizes)
    results = {p: simulate(load, machine, policy=p, options=o, limits=Limits(max_running=16), slo=math.inf)
               for p, o in (("fcfs", {}), ("clustered", {"distinct": 4, "cycle": 2.0}))}
    assert results["clustered"].distinct < 0.9 * results["fcfs"].distinct, results
    assert results["clustered"].loads <= results["fcfs"].loads


def test_early_abort_gives_up_what_is_late_and_turns_under_overload():
    policy = EarlyAbort(margin=0.5)
    late, soon, none, begun = (request(n, arrived=0.0, deadline=d) for n, d in (("l", 6.0), ("s", 6.1), ("n", None), ("b", 1.0)))
    begun.first_token = 0.5
    assert names(policy.hopeless([late, soon, none, begun], 5.5)) == "l"
    waiting = [request(n) for n in "abc"]
    assert names(policy.order(waiting, [], 0.0)) == "a b c"  # nothing known yet
    for r in waiting:
        policy.arrived(r, [])
    policy.admitted(waiting[0])
    assert names(policy.order(waiting, [], 0.0)) == "c b a" and policy.rate == pytest.approx(2.1) and policy.batch == 1.0
    for _ in range(4):
        policy.admitted(waiting[0])
    assert names(policy.order(waiting, [], 0.0)) == "a b c" and policy.rate == pytest.approx(0.63) and policy.batch == pytest.approx(3.1)


def test_attainment_at_overload_is_ordered_as_in_the_paper():
    """S-LoRA, 1.2 times the capacity: early abort above newest first above first come, first served."""
    shape = dict(adapters=200, prompt=(8, 256), answer=(8, 256), ranks=(64, 32, 16, 8))
    limits = Limits(max_running=64, max_tokens=512, chunk=256)
    closed = trace(rate=1.0, duration=800, **shape).at_once()
    capacity = simulate(closed, BIG, limits=limits, slo=math.inf).metrics.throughput
    load = trace(rate=1.2 * capacity, duration=300, **shape)
    got = {p: simulate(load, BIG, policy=p, limits=limits, slo=6.0).metrics for p in ("early_abort", "newest", "fcfs")}
    attained = [got[p].attainment for p in ("early_abort", "newest", "fcfs")]
    assert attained[0] > attained[1] > attained[2] + 0.2, attained
    assert got["early_abort"].unfinished > 0 == got["newest"].unfinished == got["fcfs"].unfinished
    easy = trace(rate=0.3 * capacity, duration=100, **shape)
    assert all(simulate(easy, BIG, policy=p, limits=limits, slo=6.0).metrics.attainment > 0.98 for p in got)


def flood(policy):
    """Tenant a floods, b asks steadily for less than its share; the times to b's first tokens."""
    count = 300
    arrivals = np.concatenate([np.zeros(count), np.arange(40) * 6.0])
    order = np.argsort(arrivals, kind="stable")
    load = Trace(arrivals[order], np.zeros(len(order), dtype=np.int64), np.full(len(order), 8), np.full(len(order), 8), (1,), 1.0)
    who = ["a" if i < count else "b" for i in order]
    out = simulate(load, SMALL, policy=policy, limits=Limits(max_running=4), slo=math.inf, tenant=lambda i: who[i])
    return [r.first_token - r.arrived for r, tenant in zip(out.requests, who) if tenant == "b"]


def test_fair_keeps_the_share_of_those_who_ask_for_less():
    fair, unfair = flood("fair"), flood("fcfs")
    assert max(fair) <= 24 and np.median(fair) <= 12, fair  # one or two answers of eight steps, not the queue of the other
    assert np.median(unfair) > 200


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_counters_of_tenants_that_wait_stay_close(weight):
    draw, pages = random.Random(0), 40
    policy = Fair({"b": weight})
    scheduler = roomy(policy, Limits(max_running=12), pages=pages)
    requests = [request(str(i), prompt=draw.randint(1, 60), answer=draw.randint(1, 60), tenant="ab"[i % 2]) for i in range(300)]
    for r in requests:
        scheduler.add(r)
    bound, spread = max(1.0 * 60, 2.0 * pages * 8) / min(weight, 1.0), []
    while {"a", "b"} <= {r.tenant for r in scheduler.waiting}:
        compute(scheduler, scheduler.step())
        spread.append(abs(policy.counters["a"] - policy.counters["b"]))
        assert spread[-1] <= bound
    served = {t: sum(len(r.prompt) + 2 * len(r.output) for r in requests if r.output and r.tenant == t) for t in "ab"}
    assert served["b"] / served["a"] == pytest.approx(weight, rel=0.15), served


def test_nobody_saves_up_while_away():
    policy = Fair()
    a, b = request("a", tenant="a"), request("b", tenant="b")
    policy.arrived(a, [])
    policy._charge("a", 1000.0)
    policy.arrived(b, [a])
    assert policy.counters["b"] == 1000.0
    policy.admitted(a)
    policy.arrived(request("c", tenant="c"), [])  # nobody waits: as far as the one that was served last
    assert policy.counters["c"] == policy.counters["a"] == 1004.0
    assert names(policy.order([a, b], [], 0.0)) == "b a"


def test_policies_by_name():
    assert set(POLICIES) == {"fcfs", "newest", "clustered", "early_abort", "fair"}
    for name, options, words in [("fifo", {}, "no scheduling policy"), ("fair", {"x": 1}, "no such options"),
                                 ("clustered", {"distinct": 0}, "0 adapters"), ("fair", {"weights": {"a": 0.0}}, "weight")]:
        with pytest.raises(UsageError, match=words):
            make_policy(name, **options)


# -- faults -----------------------------------------------------------------------------------------------------------------------------
class Source:
    def __init__(self, sizes):
        self.by_name = sizes

    def digest(self, name):
        if name not in self.by_name:
            raise ArtifactError(f"no {name}", remedy="put it there")
        return name

    def sizes(self, digest):
        return self.by_name[digest]

    def virtual(self, digest, prompt):
        return ()

    def load(self, digest, place):
        return digest, lambda: None


def test_an_adapter_that_is_gone_or_grew_fails_its_own_requests():
    source = Source({"x": [8], "y": [8], "z": [8]})
    scheduler = roomy(Policy(), Limits(max_running=1), pages=8, source=source)
    requests = [request(name, name) for name in "xyz"]
    for r in requests:
        scheduler.add(r)
    compute(scheduler, scheduler.step())
    del source.by_name["y"]
    source.by_name["z"] = [10_000]
    failed = []
    for _ in range(8):
        step = scheduler.step()
        failed += step.failed
        compute(scheduler, step)
    assert [(r.id, type(error)) for r, error in failed] == [("y", ArtifactError), ("z", UsageError)]
    assert len(requests[0].output) == 4 and not scheduler.waiting and not scheduler.running
    assert all(r.status is Status.FINISHED for r in requests)
    scheduler.memory.check()


def test_a_request_that_the_pool_cannot_hold_is_refused():
    with pytest.raises(UsageError, match="pages"):
        simulate(Trace(np.zeros(1), np.zeros(1, dtype=np.int64), np.array([300]), np.array([300]), (1,), 1.0), SMALL)


# -- traffic ----------------------------------------------------------------------------------------------------------------------------
def test_the_generator_draws_as_the_published_one():
    made = trace(adapters=50, rate=3.0, duration=40.0, alpha=0.4, cv=2.0, prompt=(8, 99), answer=(4, 77), ranks=(64, 8))
    np.random.seed(42)
    adapters = (np.random.power(0.4, 120) * 50).astype(int)
    prompts, answers = np.random.randint(8, 99, 120), np.random.randint(4, 77, 120)
    now, arrivals = 0.0, []
    for gap in np.random.gamma(0.25, 4 / 3.0, 120):
        arrivals.append(now := now + gap)
    assert np.array_equal(made.adapters, adapters) and np.array_equal(made.prompts, prompts) and np.array_equal(made.answers, answers)
    np.testing.assert_allclose(made.arrivals, arrivals, rtol=1e-12)
    assert [made.rank(i) for i in range(4)] == [64, 8, 64, 8] and len(made) == 120
    again = trace(adapters=50, rate=3.0, duration=40.0, alpha=0.4, cv=2.0, prompt=(8, 99), answer=(4, 77), ranks=(64, 8))
    assert made.hash == again.hash != trace(adapters=50, rate=3.0, duration=40.0, alpha=0.4, cv=2.0, prompt=(8, 99), answer=(4, 77)).hash


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_moments_of_the_generator(cv):
    made = trace(adapters=200, rate=10.0, duration=20_000.0, cv=cv)
    gaps = np.diff(made.arrivals, prepend=0.0)
    assert len(gaps) == 200_000 and gaps.mean() == pytest.approx(0.1, rel=0.02 * max(cv / 2, 1))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.02 * max(cv / 2, 1))
    counts = np.bincount(made.adapters, minlength=200)
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 199 + 4 * math.sqrt(2 * 199)  # chi-square: alpha = 1 is uniform
    assert made.prompts.min() == 8 and made.prompts.max() == 511


@pytest.mark.parametrize("alpha, busiest", [(0.6, 0.042), (0.3, 0.205), (0.1, 0.59)])
def test_small_alpha_is_skewed(alpha, busiest):
    made = trace(adapters=200, rate=10.0, duration=5_000.0, alpha=alpha)
    assert np.bincount(made.adapters).max() / len(made) == pytest.approx(busiest, rel=0.06)


def test_bursts_of_their_own():
    made = trace_per_adapter(adapters=10, rate=10.0, duration=10_000.0, alpha=1.0, cv=3.0)
    shares = np.bincount(made.adapters) / len(made)
    wanted = 1 / np.arange(1, 11) / (1 / np.arange(1, 11)).sum()
    np.testing.assert_allclose(shares, wanted, rtol=0.2)
    assert len(made) == pytest.approx(100_000, rel=0.05) and (np.diff(made.arrivals) >= 0).all()
    gaps = np.diff(made.arrivals[made.adapters == 0])
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.06)
    assert made.hash == trace_per_adapter(adapters=10, rate=10.0, duration=10_000.0, alpha=1.0, cv=3.0).hash


def test_mixes_of_adapters():
    assert [group_sizes(kind, 10) for kind in ("identical", "distinct", "uniform")] == [[10], [1] * 10, [3, 3, 2, 2]]
    assert group_sizes("skewed", 10) == [1, 1, 2, 3, 3] and sum(group_sizes("skewed", 64)) == 64
    for call in (lambda: group_sizes("zipf", 4), lambda: trace(adapters=0, rate=1, duration=1),
                 lambda: trace(adapters=1, rate=1, duration=0.5), lambda: trace(adapters=1, rate=1, duration=5, prompt=(8, 8))):
        with pytest.raises(UsageError):
            call()


def test_metrics_by_hand():
    records = [Record(0.0, 4, 2, 1.0, 3.0, True), Record(1.0, 2, 2, 7.0, 9.0, True), Record(2.0, 4, 0, None, 8.0, False),
               Record(2.0, 6, 4, 5.0, 12.0, True)]
    got = metrics(records, elapsed=40.0, slo=6.0, rate=0.1)
    assert (got.requests, got.finished, got.unfinished) == (4, 3, 1)
    assert got.throughput == 3 / 40 and got.stripped_throughput == (3 - 2.0) / 20 and got.tokens_per_second == 8 / 40
    assert got.latency == pytest.approx((3 + 8 + 10) / 3) and got.per_token == pytest.approx((3 / 6 + 8 / 4 + 10 / 10) / 3)
    assert got.per_answer_token == pytest.approx((3 / 2 + 8 / 2 + 10 / 4) / 3)
    assert (got.ttft_mean, got.ttft_p50) == (pytest.approx(10 / 3), 3.0)
    assert got.ttft_p90 == pytest.approx(5.4) and got.ttft_p95 == pytest.approx(5.7)
    assert got.attainment == 2 / 4 and got.satisfaction == pytest.approx((1 - 1 / 36 + 1 - 1 / 4) / 4)
    assert metrics(records[:1], elapsed=12.0, slo=6.0, rate=1.0).stripped_throughput is None
    assert math.isnan(metrics([], elapsed=0.0, slo=6.0).ttft_p50)


# -- the simulator ----------------------------------------------------------------------------------------------------------------------
def test_the_clock_is_the_formula():
    load = Trace(np.array([0.0, 0.0]), np.array([0, 1]), np.array([5, 3]), np.array([2, 1]), (2,), 1.0)
    machine = Machine(StepCost(1.0, 0.1, 0.01, 0.0001), SMALL.layers, 40, SMALL.sizes, page_tokens=8)
    out = simulate(load, machine)
    first = 1.0 + 0.1 * 8 + 0.01 * 2 + 0.0001 * 2 * 160  # both prompts and both adapters
    assert [r.first_token for r in out.requests] == [pytest.approx(first)] * 2
    assert out.requests[0].ended == out.metrics.elapsed == pytest.approx(first + 1.0 + 0.1 + 0.01)
    assert (out.steps, out.distinct, out.loads, out.loaded) == (2, 1.5, 2, 320)


def test_shared_prompts_are_computed_once_on_the_same_adapter():
    load = Trace(np.array([0.0, 50.0, 50.0]), np.array([0, 0, 1]), np.array([33, 33, 33]), np.array([4, 4, 4]), (2,), 1.0)
    out = simulate(load, SMALL, prefix_cache=True)
    assert [r.cached for r in out.requests] == [0, 32, 0]


def test_two_thousand_adapters_twice_the_same():
    load = trace(adapters=2000, rate=2.0, duration=60.0, alpha=0.6, cv=2.0)
    runs = [simulate(load, BIG, policy="clustered", limits=Limits(max_running=64)) for _ in range(2)]
    assert runs[0].metrics == runs[1].metrics and runs[0].trace == runs[1].trace == load.hash
    assert runs[0].metrics.finished == len(load) and runs[0].preempted == 0 and runs[0].evictions > 0
    times = [[(r.first_token, r.ended) for r in run.requests] for run in runs]
    assert times[0] == times[1]

"""When an adapter is merged: the rule by hand-made cases, and on a virtual clock against both pure modes."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.errors import UsageError
from graftwork.serving.engine.memory import Memory
from graftwork.serving.engine.merging import Merging, Pace
from graftwork.serving.engine.policies import POLICIES
from graftwork.serving.engine.pool import LayerShape, Pool
from graftwork.serving.engine.scheduler import Limits, Policy, Scheduler, Step
from graftwork.serving.simulate import Machine, StepCost, lora_sizes, simulate
from graftwork.serving.workload import Trace
from test_scheduling import LIMITS, SMALL, Source, compute, request, traffic

pytestmark = pytest.mark.slow

# one adapter more in a step costs two thirds of a bare one, merging three of them
BIG = Machine(StepCost(0.03, 0.0005, adapter=0.02, switch=0.1), (LayerShape(3, 64, 64),) * 4, 4096, lora_sizes([(576, 576)], 4))
LIMIT = Limits(max_running=16, max_tokens=256, chunk=64)


def always(content):
    return True


def ran(rule, content, requests, seconds, switch=0.0, others=0, times=1):
    """Steps as the engine reports them."""
    for _ in range(times):
        work = [(request(str(i)), 1) for i in range(requests)]
        for r, _ in work:
            r.resident = type("Resident", (), {"digest": "a"})
        rule.ran(Step(work=work, merged=content), requests + others, seconds, switch)
        switch = 0.0


def learned(**options):
    """A rule that has seen both modes: a merged step takes half of an unmerged one."""
    rule = Merging(**options)
    ran(rule, None, 8, 2.0, times=5)
    ran(rule, "a", 8, 1.0, times=5)
    return rule


def test_thresholds():
    rule = Merging()
    assert rule.choose(["a"] * 7 + [""], always) is None  # right is 1 at the start
    assert rule.choose(["a"] * 8, always) == "a" and rule.choose([], always) is None
    assert rule.choose([""] * 8, always) is None  # the base has nothing to merge
    assert rule.choose(["a"] * 8, lambda content: False) is None
    rule.refuse("a", "routes tokens")
    assert rule.choose(["a"] * 8, always) is None
    rule = learned()
    assert rule.ratio == pytest.approx(0.5) and rule.left == pytest.approx(0.5) and rule.merged == "a"
    assert rule.choose(["a"] * 4 + ["b"] * 4, always) == "a"
    assert rule.choose(["a"] * 3 + ["b"] * 5, always) is None
    assert rule.choose(["b"] * 8, always) == "b"


def test_thresholds_follow_what_was_measured():
    rule = learned()
    assert rule.right == 1.0
    ran(rule, None, 8, 2.0)  # the merged period moved on 8 in 1 s, 8 in 2 s would have been usual: it won
    assert rule.right == pytest.approx(0.95)
    ran(rule, "a", 8, 1.0, switch=500.0, times=5)  # that unmerged step lost against a merged one of the same size
    assert rule.left == pytest.approx(0.5 / 1.1)
    ran(rule, None, 8, 2.0)  # the switch cost more than it brought
    assert rule.right == 1.0  # 0.95 * 1.1, at most 1
    for _ in range(40):
        ran(rule, "a", 8, 1.0, times=3)
        ran(rule, None, 8, 2.0)
    assert rule.right == pytest.approx(0.1) and rule.left <= rule.right
    for _ in range(5):  # merged steps that leave almost everybody out: 1 of 20 requests
        ran(rule, "a", 1, 1.0, others=19, times=5)
        ran(rule, None, 20, 2.0)
    assert rule.right == pytest.approx(0.1 * 1.1**5)


def test_who_is_passed_over_is_owed_steps():
    rule = learned(patience=8.0)
    queue, merged = ["a"] * 6 + ["b"] * 2, []
    for _ in range(40):
        merged.append(rule.choose(queue, always) is not None)
        if not merged[-1]:
            rule.merged = "a"  # as if it were merged again at once
    # a merged step costs the ratio's reciprocal, 2 credits; from 8 on they are paid back, one a step, down to below 4
    assert merged[:16] == [True] * 4 + [False] * 5 + [True] * 3 + [False] * 4, merged
    assert rule.choose(["a"] * 8, always) == "a" and not rule.credits  # nothing is kept of adapters that nobody asks for


def test_wrong_options():
    for options in ({"patience": 0}, {"add": 0}, {"cut": 1.0}, {"patience": math.nan}):
        with pytest.raises(UsageError, match="merging with"):
            Merging(**options)


def test_the_pace_is_a_line_and_never_falls():
    pace = Pace()
    for tokens in (1, 4, 9, 2, 30):
        pace.add(tokens, 0.5 + 0.25 * tokens)
    assert pace.seconds(100) == pytest.approx(25.5) and pace.seconds(1) == pytest.approx(0.75)
    steady, odd = Pace(), Pace()
    for _ in range(5):
        steady.add(8, 2.0)
    assert steady.seconds(1) == steady.seconds(50) == pytest.approx(2.0)
    for tokens in (1, 2, 3, 100):
        odd.add(tokens, 1.0 / tokens)
    assert 0 < odd.seconds(1) == odd.seconds(1000)
    for _ in range(400):  # forgets
        steady.add(8, 1.0)
    assert steady.seconds(8) == pytest.approx(1.0, abs=0.01)


# -- with the scheduler ----------------------------------------------------------------------------------------------------------------
def test_who_is_left_out_keeps_his_pages_and_his_place():
    source = Source({"a": [64], "b": [64], "c": [64]})
    pool = Pool([LayerShape(1, 1, 1)], 16, page_tokens=8, device="meta")
    scheduler = Scheduler(Memory(pool, source, prefix_cache=False), Limits(max_running=8), Policy(), lambda: 0.0)
    first, cold = request("first", "a", 8, 30), request("cold", "b", 8, 30)
    for r in (first, cold):
        scheduler.add(r)
    compute(scheduler, scheduler.step())
    waiting, newer = request("waiting", "c", 8, 24), request("newer", "a", 8, 8)
    for r in (waiting, newer):
        scheduler.add(r)
    held = list(cold.pages)
    step = scheduler.step("a")
    # 'waiting' is left out, and 'newer' would take the room that it needs
    assert [r.id for r, _ in step.work] == ["first"] and cold.pages == held and cold.computed == 8
    compute(scheduler, step)
    scheduler.finish(cold)
    step = scheduler.step("a")
    assert [r.id for r, _ in step.work] == ["first", "newer"] and scheduler.waiting == [waiting]
    scheduler.memory.check()


def test_a_merged_step_that_nothing_fits_into_is_an_ordinary_one():
    source = Source({"a": [64] * 4, "b": [64]})
    pool = Pool([LayerShape(1, 1, 1)], 10, page_tokens=8, device="meta")
    scheduler = Scheduler(Memory(pool, source, prefix_cache=False), Limits(max_running=8), Policy(), lambda: 0.0)
    scheduler.add(request("cold", "b", 8, 40))
    compute(scheduler, scheduler.step())
    scheduler.add(request("hot", "a", 8, 30))
    rule = Merging()
    rule.right = rule.left = 0.1
    rule._wanted = lambda counts, total, able: "a"
    step = rule.step(scheduler)
    assert step.merged is None and [r.id for r, _ in step.work] == ["cold"]


@settings(max_examples=40)
@given(traffic(), LIMITS, st.sampled_from(sorted(POLICIES)), st.booleans(), st.sampled_from([1.0, 4.0, 64.0]))
def test_merging_never_puts_anyone_back_and_all_finish(load, limits, policy, cache, patience):
    rule = Eager(patience=patience)
    out = simulate(load, SMALL, policy=policy, limits=limits, prefix_cache=cache, slo=math.inf, merging=rule)
    assert out.preempted == 0 and out.metrics.finished == len(load)


class Eager(Merging):
    """Merges as soon as anything may be merged, whatever was measured."""

    def _judge(self):
        self.right = self.left = 0.1

    def __init__(self, **options):
        super().__init__(**options)
        self._judge()

    def ran(self, *args):
        super().ran(*args)
        self.left = self.right = 0.1


@pytest.mark.parametrize("patience", [2.0, 16.0, 64.0])
def test_nobody_starves(patience):
    """A flood of one adapter, so that merging it never ends by itself; others come now and then and need a known number of steps."""
    draw = random.Random(0)
    hot = [(i * 0.5, 0, 4, 10) for i in range(600)]
    cold = [(draw.uniform(5, 250), draw.randint(1, 5), 4, draw.randint(1, 40)) for _ in range(20)]
    rows = sorted(hot + cold)
    load = Trace(np.array([r[0] for r in rows]), *(np.array([r[i] for r in rows]) for i in (1, 2, 3)), (1,), 1.0)
    rule, now, seen = Eager(patience=patience), [0], {}
    plain = rule.step

    def watched(scheduler):
        now[0] += 1
        for r in (*scheduler.waiting, *scheduler.running):
            seen.setdefault(r.id, [now[0], now[0]])[1] = now[0]
        return plain(scheduler)

    rule.step = watched
    machine = Machine(StepCost(0.3, 0.0, adapter=0.3), SMALL.layers, 4000, SMALL.sizes, page_tokens=8)
    out = simulate(load, machine, limits=Limits(max_running=400), merging=rule, slo=math.inf)
    assert out.merged > 100 and out.metrics.finished == len(load)
    worst = 0
    for r in out.requests:
        if r.adapter != "a0":
            steps = seen[r.id][1] - seen[r.id][0] + 1
            assert steps <= rule.latest(r.sampling.max_tokens), (r.id, steps, r.sampling.max_tokens)
            worst = max(worst, steps - r.sampling.max_tokens)
    assert worst > patience / 4, "nobody was ever passed over"


class Never(Merging):
    def choose(self, queue, able):
        return None


class MergedOnly(Merging):
    """The other pure mode: every step is merged, on the adapter whose request has waited longest."""

    def choose(self, queue, able):
        return next((content for content in queue if able(content)), None)


def halves(count=200):
    """First one adapter has 49 of 50 requests, then 12 have as many each."""
    draw = np.random.RandomState(3)
    adapters = np.concatenate([np.where(draw.rand(count) < 0.98, 0, draw.randint(1, 12, count)), draw.randint(0, 12, count)])
    arrivals = np.cumsum(draw.exponential(0.05, 2 * count))
    return Trace(arrivals, adapters, draw.randint(4, 32, 2 * count), draw.randint(8, 48, 2 * count), (8,), 20.0)


def test_the_switch_beats_both_pure_modes_when_the_skew_changes():
    load = halves()
    out = {cls: simulate(load, BIG, limits=LIMIT, merging=cls(), slo=math.inf) for cls in (Merging, Never, MergedOnly)}
    seconds = {cls: o.metrics.elapsed for cls, o in out.items()}
    waits = {cls: o.metrics.latency for cls, o in out.items()}
    assert seconds[Merging] < 0.95 * min(seconds[Never], seconds[MergedOnly]), seconds
    assert waits[Merging] < 0.95 * min(waits[Never], waits[MergedOnly]), waits
    assert out[Never].merged == 0 < out[Merging].merged < out[Merging].steps
    assert out[Merging].requests[-1].ended == simulate(load, BIG, limits=LIMIT, merging=Merging(), slo=math.inf).requests[-1].ended

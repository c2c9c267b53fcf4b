"""Concurrency limits: what the formulas say at known inputs, and what the policies do with a small closed model of a target."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import limits
from gateway.core.baseline import Baseline, Probe
from gateway.core.windows import Correlation, Window
from gateway.policy import Ending, Sample
from plugins.aimd import Aimd, AimdConfig
from plugins.fixed_limit import FixedLimit, FixedLimitConfig
from plugins.gradient2 import Gradient2, Gradient2Config
from plugins.vegas import Vegas, VegasConfig

SCOPE = "infer.plan"
SAMPLE = Sample(SCOPE, Ending.SUCCEEDED, 0.1, 0.0, 0.1, 5)
ADAPTIVE: list[tuple[Callable[[Any], Any], Any]] = [
    (Aimd, AimdConfig(initial=20, min_limit=2, max_limit=50)),
    (Gradient2, Gradient2Config(initial=20, min_limit=2, max_limit=50)),
    (Vegas, VegasConfig(initial=20, min_limit=2, max_limit=50)),
]


# ---- formulas ------------------------------------------------------------------------------------------------------------------


def test_aimd_backs_off_by_a_tenth_and_grows_by_one_while_in_use() -> None:
    assert limits.aimd(20, 20, overloaded=True) == pytest.approx(18)
    assert limits.aimd(20, 10, overloaded=False) == 21
    assert limits.aimd(20, 9, overloaded=False) == 20


def test_gradient2_as_published() -> None:
    assert limits.gradient2(100, 1.0, 1.0) == pytest.approx(0.8 * 100 + 0.2 * (100 + 4))
    assert limits.gradient2(100, 1.0, 2.0) == pytest.approx(80 + 0.2 * (75 + 4)), "1.5 * 1 / 2"
    assert limits.gradient2(100, 1.0, 100.0) == pytest.approx(80 + 0.2 * (50 + 4)), "never below a half"


def test_vegas_as_published() -> None:
    assert limits.queue_size(100, 0.1, 0.125) == pytest.approx(20)
    assert limits.queue_size(100, 0.1, 0.05) == 0
    assert limits.vegas_bounds(100) == pytest.approx((2, 6, 12))
    for queue, after in ((0, 112), (2, 112), (4, 102), (6, 100), (12, 100), (13, 98)):
        assert limits.vegas(100, queue) == pytest.approx(after)
    assert limits.vegas(100, 0, dropped=True) == pytest.approx(98)


# ---- windows, correlation, baseline --------------------------------------------------------------------------------------------


def test_a_window_has_means_and_the_error_of_the_mean() -> None:
    window = Window(0.0)
    for inflight, queue_s, own_s in ((2, 0.0, 1.0), (4, 0.5, 3.0)):
        window.add(inflight, queue_s, own_s)
    assert (window.inflight, window.queue_s, window.own_s, window.deviation_s) == (3, 0.25, 2.0, 1.0)
    assert window.error_s == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize(("slope", "expected"), [(2.0, 1.0), (-0.5, -1.0), (0.0, 0.0)])
def test_correlation_of_a_line(slope: float, expected: float) -> None:
    correlation = Correlation()
    for x in range(1, 30):
        correlation.add(float(x), 7 + slope * x)
    assert correlation.value == pytest.approx(expected)
    assert correlation.spread > 0.1


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), max_size=60))
def test_a_correlation_is_one(pairs: list[tuple[float, float]]) -> None:
    correlation = Correlation()
    for x, y in pairs:
        correlation.add(x, y)
    assert -1 <= correlation.value <= 1


def test_a_probe_counts_what_was_dispatched_in_it_and_a_surprising_one_is_believed() -> None:
    base = Baseline()
    base.add(0.1, 50)
    probe = Probe(6, 8, round_trip_s=0.2, idle_s=0.2, deviation_s=0.01, now_s=10.0)
    assert probe.until_s == pytest.approx(10.25)
    for dispatched_s in (9.9, 10.1, 10.2, 10.25, 10.3):
        probe.add(0.2 if dispatched_s > 10 else 5.0, dispatched_s)
    assert probe.steps.count == 3
    assert probe.steps.own_s == pytest.approx(0.2)
    base.learn(probe.steps, 0.3)
    assert base.value_s == pytest.approx((50 * 0.1 + 3 * 0.2) / 53), "within the error that steps of such a spread have: averaged"
    base.learn(probe.steps, 0.001)
    assert base.value_s == pytest.approx(0.2), "far outside of it: the target has changed"


# ---- policies ------------------------------------------------------------------------------------------------------------------


class Target:
    """A full gate in front of `slots` executions of service_s each, in rounds: everything in flight ends, and as much begins. In the first
    round steps find as many in flight as came before them.

    With more steps in flight than slots the round trip is inflight / slots * service_s; how much of that is told as a queue is `visible`.
    """

    def __init__(self, policy: Any, slots: int, service_s: float = 0.1, *, visible: bool = True) -> None:
        self.policy, self.slots, self.service_s, self.visible = policy, slots, service_s, visible
        self.now_s = 0.0
        self.limits: list[int] = []

    def play(self, rounds: int, ending: Ending = Ending.SUCCEEDED, round_trip_s: float = 0.0) -> int:
        for _ in range(rounds):
            limit = self.policy.limit(SCOPE)
            for index in range(limit):
                inflight = limit if self.limits else index + 1
                took_s = round_trip_s or self.service_s * max(1.0, inflight / self.slots)
                queue_s = max(0.0, took_s - self.service_s) if self.visible and not round_trip_s else 0.0
                self.now_s += took_s / limit
                self.policy.on_sample(
                    Sample(SCOPE, ending, took_s, queue_s, took_s - queue_s, inflight, 1.0, queue_s), self.now_s, index / limit
                )
            self.limits.append(self.policy.limit(SCOPE))
        return self.limits[-1]


samples = st.builds(
    Sample,
    scope=st.just(SCOPE),
    ending=st.sampled_from(Ending),
    round_trip_s=st.sampled_from([0.0, 1e-6, 0.01, 0.1, 3.0, 100.0]),
    queue_s=st.sampled_from([0.0, 0.05, 200.0]),
    service_s=st.just(0.01),
    inflight=st.integers(1, 60),
)


@pytest.mark.parametrize(("build", "config"), ADAPTIVE, ids=lambda value: getattr(value, "__name__", ""))
@given(script=st.lists(st.tuples(samples, st.floats(0, 0.5), st.floats(0, 1, exclude_max=True), st.integers(1, 40)), max_size=40))
def test_bounds_are_kept_whatever_happens(build: Any, config: Any, script: list[tuple[Sample, float, float, int]]) -> None:
    policy, now_s = build(config), 0.0
    for sample, gap_s, random, times in script:
        for _ in range(times):
            now_s += gap_s
            policy.on_sample(sample, now_s, random)
            limit = policy.limit(SCOPE)
            assert isinstance(limit, int)
            assert config.min_limit <= limit <= config.max_limit


@pytest.mark.parametrize(("build", "config"), ADAPTIVE, ids=lambda value: getattr(value, "__name__", ""))
def test_new_parameters_hold_at_once_and_the_rest_stays(build: Any, config: Any) -> None:
    policy = build(config)
    Target(policy, 100).play(30)
    assert policy.limit(SCOPE) == 50
    policy.reconfigure(replace(config, max_limit=60))
    assert policy.limit(SCOPE) == 50, "learnt, and not forgotten"
    policy.reconfigure(replace(config, max_limit=30))
    assert policy.limit(SCOPE) == 30


@pytest.mark.parametrize(("build", "config"), ADAPTIVE, ids=lambda value: getattr(value, "__name__", ""))
def test_what_was_ignored_teaches_nothing(build: Any, config: Any) -> None:
    policy = build(config)
    for index in range(300):
        policy.on_sample(replace(SAMPLE, ending=Ending.IGNORED, round_trip_s=50.0, inflight=40), index * 0.1, 0.5)
    assert policy.limit(SCOPE) == 20


@pytest.mark.parametrize("visible", [True, False], ids=["queue measured", "queue hidden"])
@pytest.mark.parametrize("slots", [2, 4, 8, 32, 200])
def test_vegas_finds_the_slots_that_nobody_tells_it(slots: int, visible: bool) -> None:
    target = Target(Vegas(VegasConfig()), slots, visible=visible)
    target.play(400)
    settled = target.limits[200:]
    _, alpha, beta = limits.vegas_bounds(slots, VegasConfig().queue_scale)
    typical = sorted(settled)[len(settled) // 2]
    assert slots <= typical <= slots + beta + alpha + 1, "all slots are busy, and few steps wait"


@pytest.mark.parametrize("visible", [True, False], ids=["queue measured", "queue hidden"])
def test_vegas_follows_slots_that_go_and_come_back(visible: bool) -> None:
    target = Target(Vegas(VegasConfig()), 32, visible=visible)
    assert 32 <= target.play(60) <= 40
    target.slots = 16
    target.play(20)
    assert 16 <= sorted(target.limits[-9:])[4] <= 22
    target.slots = 32
    target.play(20 if visible else 30)
    assert 32 <= sorted(target.limits[-9:])[4] <= 45


def test_vegas_takes_a_slower_target_for_slower_and_not_for_queued() -> None:
    target = Target(Vegas(VegasConfig()), 32, visible=False)
    target.play(60)
    target.service_s *= 2
    target.play(40)
    assert sorted(target.limits[-9:])[4] >= 32


def test_vegas_takes_a_long_way_for_no_queue_of_the_target() -> None:
    """Transport that grows with what is in flight, as on a busy gateway; the same time inside the execution is a hidden queue."""
    policies = Vegas(VegasConfig(max_limit=100)), Vegas(VegasConfig(max_limit=100))
    limits_seen: tuple[list[int], list[int]] = [], []
    now_s = 0.0
    for step in range(5000):
        for policy, seen, service_s in zip(policies, limits_seen, (0.01, 0.0), strict=True):
            inflight = policy.limit(SCOPE)
            seen.append(inflight)
            round_trip_s = 0.01 + 0.002 * inflight
            policy.on_sample(Sample(SCOPE, Ending.SUCCEEDED, round_trip_s, 0.0, service_s or round_trip_s, inflight), now_s, step % 7 / 7)
        now_s += 0.004
    transport, hidden = (sorted(seen[-2000:])[1000] for seen in limits_seen)
    assert transport == 100
    assert hidden < 60


def test_vegas_takes_for_a_queue_only_what_goes_with_waits_for_slots() -> None:
    """Half of the round trip is spent before the worker starts: on the way while it has free slots, else in its queue."""
    found = []
    for worker_wait_s in (0.0, 0.05):
        policy, now_s, seen = Vegas(VegasConfig(initial=20, max_limit=100)), 0.0, []
        for step in range(3000):
            policy.on_sample(Sample(SCOPE, Ending.SUCCEEDED, 0.1, 0.05, 0.05, policy.limit(SCOPE), 1.0, worker_wait_s), now_s, step % 7 / 7)
            now_s += 0.005
            seen.append(policy.limit(SCOPE))
        found.append(sorted(seen[-1000:])[500])
    assert found[0] == 100
    assert found[1] < 20


def test_vegas_holds_a_limit_that_is_not_in_use() -> None:
    policy = Vegas(VegasConfig(initial=20))
    for index in range(500):
        policy.on_sample(replace(SAMPLE, inflight=9), index * 0.01, 0.5)
    assert policy.limit(SCOPE) == 20


def test_vegas_goes_down_while_the_objective_is_missed_though_no_ratio_says_so() -> None:
    policy = Vegas(VegasConfig(initial=64, objective_s=1.0, scopes={"tool.slow": 5.0}))
    target = Target(policy, 1000, service_s=2.0)
    assert target.play(40) == 1
    patient = Vegas(VegasConfig(initial=64, max_limit=100, objective_s=1.0, scopes={SCOPE: 5.0}))
    assert Target(patient, 1000, service_s=2.0).play(40) == 100


def test_drops_take_vegas_down_unless_they_are_few_or_the_deadline_was_too_short_for_an_idle_target() -> None:
    assert Target(Vegas(VegasConfig(initial=64)), 64).play(30, Ending.DROPPED, 2.0) == 1
    policy = Vegas(VegasConfig(initial=20, max_limit=20))
    for index in range(2000):
        hurried = index % 2
        ending, took_s = (Ending.DROPPED, 0.01) if hurried else (Ending.SUCCEEDED, 0.1)
        policy.on_sample(replace(SAMPLE, ending=ending, round_trip_s=took_s, inflight=10 if index < 200 else 20), index * 0.005, 0.5)
    assert policy.limit(SCOPE) >= 16


def test_a_backend_that_only_times_out_makes_gradient2_drift_and_not_vegas() -> None:
    drifting = Target(Gradient2(Gradient2Config()), 8)
    assert drifting.play(30, Ending.DROPPED, 2.0) == 200, "the known failure of a ratio of two averages"
    steady = Target(Vegas(VegasConfig()), 8)
    steady.play(60)
    assert steady.play(30, Ending.DROPPED, 2.0) == 1
    assert 8 <= sorted((steady.play(120), *steady.limits[-30:]))[15] <= 11, "and it finds back"


def test_overload_makes_gradient2_drift() -> None:
    target = Target(Gradient2(Gradient2Config()), 8)
    assert target.play(600) > 2 * 20


def test_aimd_goes_down_with_slowness_and_failures_only() -> None:
    policy = Aimd(AimdConfig(initial=20))
    policy.on_sample(replace(SAMPLE, round_trip_s=6.0), 0.0, 0.5)
    assert policy.limit(SCOPE) == 18
    policy.on_sample(replace(SAMPLE, ending=Ending.DROPPED), 0.1, 0.5)
    assert policy.limit(SCOPE) == 16


def test_a_constant_changes_with_its_configuration_only() -> None:
    policy = FixedLimit(FixedLimitConfig(limit=3, scopes={"tool.x": 7}))
    policy.on_sample(SAMPLE, 0.0, 0.5)
    assert (policy.limit(SCOPE), policy.limit("tool.x")) == (3, 7)
    policy.reconfigure(FixedLimitConfig(limit=4))
    assert (policy.limit(SCOPE), policy.limit("tool.x")) == (4, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VegasConfig(initial=0),
        lambda: VegasConfig(objective_s=0),
        lambda: VegasConfig(scopes={"tool.x": -1.0}),
        lambda: VegasConfig(max_drops=1.0),
        lambda: AimdConfig(backoff=1.0),
        lambda: AimdConfig(initial=300),
        lambda: Gradient2Config(tolerance=0.5),
        lambda: Gradient2Config(min_limit=30),
    ],
)
def test_wrong_parameters_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


def test_vegas_leaves_batches_room_and_no_more_than_that() -> None:
    """A model whose execution takes longer the more is in flight, as a batch does: only the workers' slots say that this is no queue."""
    policy = Vegas(VegasConfig(initial=4, max_limit=100))
    policy.batch_slots(32)
    assert policy.limit(SCOPE) == 32
    now_s = 0.0
    for _ in range(200):
        for _ in range(20):
            now_s += 0.01
            policy.on_sample(
                replace(SAMPLE, round_trip_s=0.02 * policy.limit(SCOPE), service_s=0.0, inflight=policy.limit(SCOPE)), now_s, 0.5
            )
        assert policy.limit(SCOPE) >= 32
    policy.batch_slots(0)
    policy.reconfigure(VegasConfig(initial=4, max_limit=10))
    policy.batch_slots(32)
    assert policy.limit(SCOPE) == 10, "what an operator allows at most holds"

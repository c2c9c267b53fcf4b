"""The batching seam of a worker: what the policy sees, what its answers do, and that no step is lost or sent twice."""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import loader
from gateway.config import parse
from gateway.core.containment import Containment
from gateway.policy import BatchView, ModelView, Named, OnError, Slot
from gateway.testing import ManualClock
from gateway.types import BatchCost, Kind, Target
from workers import serve
from workers.batch_queue import LEAST_WAIT_S
from workers.batching import Batch, Batcher, Batching, log_once


@dataclass
class FakePolicy:
    """Answers what `answer` says of the view."""

    answer: Callable[[BatchView], float]
    views: list[BatchView] = field(default_factory=list)
    batches: list[tuple[int, float]] = field(default_factory=list)
    only: str = ""  # the model that it serves; without one, all

    def serves(self, model: ModelView) -> bool:
        return self.only in ("", model.name)

    def learnt(self) -> BatchCost | None:
        return BatchCost(0.02, 0.001, len(self.batches)) if self.batches else None

    def wait_s(self, view: BatchView, now_s: float) -> float:
        self.views.append(view)
        return self.answer(view)

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        self.batches.append((size, service_s))


class Call:
    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def run(self) -> None:
        if self._callback is not None:
            self._callback()


async def turns() -> None:
    """Lets every task go as far as it can: a wake-up and its follow-up need no more turns than these."""
    for _ in range(4):
        await asyncio.sleep(0)


class Rig:
    """A batcher on a manual clock; steps are tasks that note when they are let go."""

    def __init__(self, answer: Callable[[BatchView], float], *, slots: int = 100, max_size: int = 8) -> None:
        self.clock = ManualClock()
        self.policy = FakePolicy(answer)
        self.contain = Containment(lambda named, what: None, self.clock.now_s)
        named = Named("hold", Slot.BATCHING, self.policy, OnError.ADMIT)
        self.batcher = Batcher(named, self.contain, self.clock, slots, max_size, self._call_later)
        self.timers = 0
        self.batches: dict[int, Batch] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def _call_later(self, delay_s: float, callback: Callable[[], object]) -> Call:
        self.timers += 1
        call = Call(callback)
        self.clock.call_at(self.clock.now_s() + delay_s, call.run)
        return call

    def arrive(self, remaining_s: float = 60.0) -> int:
        number = len(self.tasks)
        self.tasks.append(asyncio.create_task(self._step(number, remaining_s)))
        return number

    async def _step(self, number: int, remaining_s: float) -> None:
        batch = await self.batcher.enter(remaining_s)
        assert number not in self.batches, "sent twice"
        self.batches[number] = batch

    async def arrivals(self, *remaining_s: float) -> None:
        for one in remaining_s:
            self.arrive(one)
            await turns()

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await turns()


async def test_an_answer_of_zero_takes_no_turn_no_timer_and_no_future() -> None:
    rig = Rig(lambda view: 0.0)
    for _ in range(3):
        entering = rig.batcher.enter(5.0)
        with pytest.raises(StopIteration) as done:
            entering.send(None)  # it runs to its end without the event loop
        batch = done.value.value
        assert batch.size == 1
        rig.clock.advance(0.25)
        rig.batcher.leave(batch, answered=True)
    assert rig.timers == 0
    assert rig.policy.batches == [(1, 0.25)] * 3


async def test_what_the_policy_sees() -> None:
    rig = Rig(lambda view: 0.0 if view.size == 3 else 10.0, slots=10)
    rig.batcher.leave(await rig.batcher.enter(-1.0), answered=False)  # over before it came: nothing to ask
    assert rig.policy.views == []
    await rig.arrivals(30.0)
    await rig.advance(2.0)
    await rig.arrivals(4.0)
    await rig.advance(1.0)
    await rig.arrivals(30.0)
    shown = [(view.size, view.max_size, view.oldest_wait_s, view.least_slack_s, view.idle_slots) for view in rig.policy.views]
    assert shown == [(1, 8, 0.0, 30.0, 9), (2, 8, 2.0, 4.0, 8), (3, 8, 3.0, 3.0, 7)]
    assert rig.policy.views[2].arrivals_per_s > 0.0
    (batch,) = set(rig.batches.values())
    assert batch.size == 3
    await rig.arrivals(30.0)
    assert rig.policy.views[-1].idle_slots == 10 - 3 - 1  # three at work
    rig.tasks[-1].cancel()
    await turns()


async def test_it_is_asked_again_at_the_next_arrival_and_after_the_wait() -> None:
    rig = Rig(lambda view: 5.0 if view.oldest_wait_s < 5.0 else 0.0)
    await rig.arrivals(60.0)
    await rig.advance(3.0)
    await rig.arrivals(60.0)  # asked for: 5 s from here
    assert [view.size for view in rig.policy.views] == [1, 2]
    await rig.advance(2.0)  # the first timer was for now: it was called off
    assert len(rig.policy.views) == 2
    assert rig.batches == {}
    await rig.advance(3.0)
    assert len(rig.policy.views) == 3
    assert {batch.size for batch in rig.batches.values()} == {2}
    assert [batch.sent_s for batch in rig.batches.values()] == [1008.0, 1008.0]


async def test_a_full_batch_goes() -> None:
    rig = Rig(lambda view: 10.0, max_size=3)
    await rig.arrivals(60.0, 60.0)
    assert rig.batches == {}
    await rig.arrivals(60.0)
    assert [batch.size for batch in rig.batches.values()] == [3, 3, 3]
    alone = Rig(lambda view: 10.0, max_size=1)
    await alone.arrivals(60.0)
    assert alone.batches[0].size == 1


@pytest.mark.parametrize("answer", [math.inf, 1e9])
async def test_a_wait_ends_with_the_first_deadline(answer: float) -> None:
    rig = Rig(lambda view: answer)
    await rig.arrivals(60.0, 7.0)
    await rig.advance(6.9)
    assert rig.batches == {}
    await rig.advance(0.2)
    assert [batch.sent_s for batch in rig.batches.values()] == [1007.0, 1007.0]


async def test_a_tiny_wait_does_not_spin() -> None:
    rig = Rig(lambda view: 1e-12)
    await rig.arrivals(60.0)
    await rig.advance(1.5 * LEAST_WAIT_S)
    assert len(rig.policy.views) == 2
    await rig.advance(60.0)
    assert 0 in rig.batches


def raises(view: BatchView) -> float:
    raise ZeroDivisionError("no rate yet")


@pytest.mark.parametrize(("answer", "faults"), [(raises, 1), (lambda view: None, 1), (lambda view: math.nan, 1), (lambda view: -1.0, 1)])
async def test_a_policy_that_fails_sends_at_once(answer: Callable[[BatchView], float], faults: int) -> None:
    rig = Rig(answer)
    await rig.arrivals(60.0)
    assert rig.batches[0].size == 1
    assert rig.contain.counts["hold", "faults"] == faults


async def test_a_policy_that_fails_to_learn_is_contained() -> None:
    rig = Rig(lambda view: 0.0)
    rig.policy.on_batch = raises  # type: ignore[assignment]
    rig.batcher.leave(await rig.batcher.enter(1.0), answered=True)
    assert rig.contain.counts["hold", "faults"] == 1


def test_faults_are_counted_each_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    contain = Containment(log_once(), ManualClock().now_s)
    named = Named("hold", Slot.BATCHING, FakePolicy(raises), OnError.ADMIT)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert contain.call(named, "wait_s", None, 0.0, None, 0.0) == 0.0
    assert contain.counts["hold", "faults"] == 3
    (said,) = [record.message for record in caplog.records]
    assert "policy hold (batching)" in said
    assert "ZeroDivisionError: no rate yet" in said


async def test_a_cancelled_step_leaves_the_batch() -> None:
    rig = Rig(lambda view: 5.0 if view.oldest_wait_s < 5.0 else 0.0)
    await rig.arrivals(60.0, 60.0)
    rig.tasks[0].cancel()
    await turns()
    assert rig.batcher.waiting == 1
    await rig.advance(5.0)
    assert list(rig.batches) == [1]
    assert rig.batches[1].size == 1
    rig.batcher.leave(rig.batches[1], answered=True)
    await rig.arrivals(60.0)
    rig.tasks[2].cancel()
    await turns()
    asked = len(rig.policy.views)
    await rig.advance(100.0)  # nobody waits: nobody asks
    assert len(rig.policy.views) == asked


async def test_a_batch_goes_without_a_step_that_was_cancelled_a_moment_before() -> None:
    rig = Rig(lambda view: 5.0 if view.oldest_wait_s < 5.0 else 0.0)
    await rig.arrivals(60.0, 60.0, 60.0)
    rig.tasks[0].cancel()  # and has not had its turn to leave
    rig.clock.advance(5.0)
    await turns()
    assert [(number, batch.size) for number, batch in rig.batches.items()] == [(1, 2), (2, 2)]


async def test_a_step_that_is_cancelled_as_it_is_let_go_is_not_counted_as_running() -> None:
    rig = Rig(lambda view: 5.0 if view.oldest_wait_s < 5.0 else 0.0, slots=10)
    await rig.arrivals(60.0, 60.0)
    rig.clock.advance(5.0)
    rig.tasks[0].cancel()  # let go, and has not had its turn
    await turns()
    assert list(rig.batches) == [1]
    rig.clock.advance(1.0)
    rig.batcher.leave(rig.batches[1], answered=True)
    assert rig.policy.batches == [(2, 1.0)]
    await rig.arrivals(60.0)
    assert rig.policy.views[-1].idle_slots == 9
    rig.tasks[-1].cancel()
    await turns()


async def test_a_batch_is_reported_once_with_its_last_answer() -> None:
    rig = Rig(lambda view: 10.0, max_size=3)
    await rig.arrivals(60.0, 60.0, 60.0)
    batch = rig.batches[0]
    rig.clock.advance(1.0)
    rig.batcher.leave(batch, answered=True)
    rig.clock.advance(1.0)
    rig.batcher.leave(batch, answered=True)
    rig.clock.advance(1.0)
    assert rig.policy.batches == []
    rig.batcher.leave(batch, answered=False)
    assert rig.policy.batches == [(3, 2.0)]
    await rig.arrivals(60.0, 60.0, 60.0)
    for _ in range(3):
        rig.batcher.leave(rig.batches[5], answered=False)  # a server that was away: no sample
    assert rig.policy.batches == [(3, 2.0)]


def batching_of(*policies: FakePolicy) -> Batching:
    named = [Named(f"hold-{number}", Slot.BATCHING, policy, OnError.ADMIT) for number, policy in enumerate(policies)]
    return Batching(lambda: named, lambda target: 2 * target.slots, clock=ManualClock())


def view(name: str, max_batch_size: int = 0) -> ModelView:
    return ModelView(name, max_batch_size, server_batches=True, instances=1)


async def test_each_model_has_a_batcher_that_follows_its_target() -> None:
    batching = batching_of(FakePolicy(lambda view: 0.0))
    plan = Target(Kind.INFER, "plan", slots=4, max_batch_size=0)
    first = batching.batcher(plan, view("plan"))
    assert first is not None
    assert (first.slots, first.max_size) == (8, 1)
    assert batching.batcher(plan, view("plan")) is first
    assert batching.batcher(Target(Kind.INFER, "plan", slots=6, max_batch_size=32), view("plan", 32)) is first
    assert (first.slots, first.max_size) == (12, 32)
    assert batching.batcher(Target(Kind.INFER, "embed"), view("embed")) is not first


async def test_each_replica_has_a_batcher_with_its_share_and_the_best_known_cost_is_told() -> None:
    policies: list[FakePolicy] = []

    def make() -> list[Named]:
        policies.append(FakePolicy(lambda view: 0.0))
        return [Named("hold", Slot.BATCHING, policies[-1], OnError.ADMIT)]

    batching, plan = Batching(make, lambda target: target.slots), Target(Kind.INFER, "plan", slots=48)
    one = batching.batcher(plan, view("plan"), "a:1", 1 / 3)
    other = batching.batcher(plan, view("plan"), "b:1", 2 / 3)
    assert one is not None
    assert other is not None
    assert (one.slots, other.slots) == (16, 32)
    assert one.named.policy is not other.named.policy
    assert batching.batcher(plan, view("plan"), "a:1", 1 / 3) is one
    for policy, batches in zip(policies, (9, 5), strict=True):
        policy.learnt = partial(BatchCost, 0.02, 0.001, batches)  # type: ignore[method-assign]
    assert batching.learnt() == {"infer.plan": BatchCost(0.02, 0.001, 9)}
    policies[1].learnt = partial(BatchCost, 0.02, 0.001, 10)  # type: ignore[method-assign]
    assert batching.learnt() == {"infer.plan": BatchCost(0.02, 0.001, 10)}


async def test_the_first_policy_that_serves_a_model_is_its_policy() -> None:
    plans, others = FakePolicy(lambda view: 0.0, only="plan"), FakePolicy(lambda view: 0.0)
    batching = batching_of(plans, others)
    for name, policy in (("plan", plans), ("embed", others)):
        batcher = batching.batcher(Target(Kind.INFER, name), view(name))
        assert batcher is not None
        batcher.leave(await batcher.enter(1.0), answered=True)
        assert len(policy.batches) == 1
    assert batching.learnt() == {"infer.plan": BatchCost(0.02, 0.001, 1), "infer.embed": BatchCost(0.02, 0.001, 1)}
    assert batching_of(plans).batcher(Target(Kind.INFER, "embed"), view("embed")) is None


async def test_a_model_that_changed_is_offered_to_the_policies_again() -> None:
    class Small(FakePolicy):
        def serves(self, model: ModelView) -> bool:
            return model.max_batch_size < 4

    small, others = Small(lambda view: 0.0), FakePolicy(lambda view: 0.0)
    batching = batching_of(small, others)
    for size, policy in ((2, small), (8, others), (9, others)):
        batcher = batching.batcher(Target(Kind.INFER, "m", max_batch_size=size), view("m", size))
        assert batcher is not None
        assert batcher.named.policy is policy


async def test_what_a_policy_that_fails_has_learnt_is_not_told() -> None:
    policy = FakePolicy(lambda view: 0.0)
    batching = batching_of(policy)
    batching.batcher(Target(Kind.INFER, "m"), view("m"))
    for nonsense in (lambda: 5, lambda: BatchCost(math.nan, 0.0, 1), lambda: 1 / 0):
        policy.learnt = nonsense  # type: ignore[assignment, method-assign]
        assert batching.learnt() == {}
    assert batching.contain.counts["hold-0", "faults"] == 3


def test_a_worker_asks_the_policies_that_the_configuration_names() -> None:
    sections = {"targets": [{"kind": "infer", "name": "plan", "slots": 7}]}
    config = parse({"policies": [{"use": "passthrough"}, {"use": "marginal", "models": ["embed"]}]} | sections)
    batching = serve._build_batching(config, loader.build_policies(config, loader.find_plugins(config)))
    assert batching is not None
    found = {}
    for name in ("plan", "embed", "else"):
        batcher = batching.batcher(Target(Kind.INFER, name, slots=64), ModelView(name, 8, server_batches=name == "plan", instances=1))
        found[name] = (batcher.named.name, batcher.slots) if batcher is not None else None
    assert found == {"plan": ("passthrough", 7), "embed": ("marginal", 64), "else": None}
    config = parse({"policies": [{"use": "fixed_limit"}]} | sections)
    assert serve._build_batching(config, loader.build_policies(config, loader.find_plugins(config))) is None


WAITS = st.sampled_from([0.0, 1e-6, 0.01, 0.5, 3.0, math.inf, math.nan, -1.0, None])
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.floats(0.0, 5.0)),
        st.tuples(st.just("cancel"), st.integers(0, 8)),
        st.tuples(st.just("advance"), st.floats(0.0, 2.0)),
        st.tuples(st.just("answer"), st.integers(0, 8)),
        st.tuples(st.just("turn"), st.none()),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(moves=MOVES, waits=st.lists(WAITS, min_size=1, max_size=12), max_size=st.integers(1, 5))
def test_no_step_is_lost_or_sent_twice_and_waits_end(moves: list[tuple[str, float]], waits: list[float], max_size: int) -> None:
    async def play() -> None:
        rig = Rig(lambda view: waits[len(rig.policy.views) % len(waits)], max_size=max_size)
        left: set[int] = set()
        for move, value in moves:
            if move == "arrive":
                rig.arrive(value)
            elif move == "cancel" and value < len(rig.tasks):
                rig.tasks[int(value)].cancel()
            elif move == "advance":
                rig.clock.advance(value)
            elif move == "answer" and value in rig.batches and value not in left:
                left.add(int(value))
                rig.batcher.leave(rig.batches[int(value)], answered=True)
            elif move == "turn":
                await turns()
        await turns()
        await rig.advance(6.0)  # past every deadline
        assert rig.batcher.waiting == 0
        ended = await asyncio.gather(*rig.tasks, return_exceptions=True)
        for number, outcome in enumerate(ended):
            cancelled = isinstance(outcome, asyncio.CancelledError)
            assert outcome is None or cancelled, outcome
            assert (number in rig.batches) is not cancelled
        for number in rig.batches.keys() - left:
            rig.batcher.leave(rig.batches[number], answered=True)
        assert all(batch.left == 0 for batch in rig.batches.values())
        assert all(1 <= batch.size <= max_size for batch in rig.batches.values())
        assert sorted(size for size, _ in rig.policy.batches) == sorted(batch.size for batch in set(rig.batches.values()))
        assert all(view.idle_slots <= 99 for view in rig.policy.views)

    asyncio.run(play())

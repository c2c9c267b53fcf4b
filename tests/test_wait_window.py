"""What a worker tells with each result about the waits that it sees, and what policies hear of it."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Config
from gateway.core.passage import Passage
from gateway.policy import Ending
from gateway.ports import Delivery, Executor, Queue, Work, WorkerBus
from gateway.testing import ManualClock
from gateway.types import Flow, Kind, Lane, Payload, Status, Step, StepResult, Target
from workers.held import Held
from workers.lanes import Lane as WorkerLane
from workers.lanes import TargetLanes
from workers.life import StepLife
from workers.outcome import Outcomes
from workers.wait_window import WINDOW_STEPS, WaitWindow, WaitWindows


def test_the_average_is_of_the_last_second() -> None:
    window = WaitWindow()
    assert window.average_us == 0
    for now_s, waited_us, average_us in ((0.0, 100, 100), (0.5, 300, 200), (0.9, 200, 200), (1.2, 400, 300), (1.6, 0, 200)):
        window.add(waited_us, now_s)
        assert window.average_us == average_us, now_s


def test_the_newest_step_always_counts_and_old_ones_do_not() -> None:
    window = WaitWindow()
    window.add(9_000_000, 0.0)
    window.add(50, 300.0)
    assert window.average_us == 50


def test_the_window_is_bounded() -> None:
    window = WaitWindow()
    for index in range(WINDOW_STEPS + 500):
        window.add(1_000_000 if index < 500 else 10, 0.0)
    assert window.average_us == 10


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 10**9)), min_size=1, max_size=80))
def test_the_average_is_that_of_what_is_in_the_window(steps: Sequence[tuple[float, int]]) -> None:
    window, now_s, seen = WaitWindow(), 0.0, []
    for gap_s, waited_us in steps:
        now_s += gap_s
        window.add(waited_us, now_s)
        seen.append((now_s, waited_us))
    inside = [waited_us for at_s, waited_us in seen if at_s > now_s - 1.0]
    assert window.average_us == sum(inside) // len(inside)


def test_targets_are_apart() -> None:
    windows = WaitWindows()
    windows.add("a", 10, 0.0)
    assert (windows.average_us("a"), windows.average_us("b")) == (10, 0)


def test_policies_hear_of_it() -> None:
    flow = Flow("acme", "echo", Kind.TOOL, Lane.STANDARD)
    passage = Passage(Step("s1", "acme", Kind.TOOL, "echo", Payload(), 9.0), flow, 0.0, None, lambda passage, error: None)
    assert passage.sample(Ending.DROPPED, 1.0).worker_wait_s == 0.0
    passage.result = StepResult("s1", "acme", Status.DONE, worker_wait_us=350_000)
    assert passage.sample(Ending.SUCCEEDED, 1.0).worker_wait_s == 0.35


class Bus:
    """The part of a worker's bus that a step without trouble needs."""

    def __init__(self) -> None:
        self.results: dict[str, StepResult] = {}

    async def result(self, tenant: str, step_id: str, region: str) -> StepResult | None:
        return None

    async def commit(self, result: StepResult, keep_s: float, region: str) -> bool:
        self.results[result.step_id] = result
        return True

    def publish_event(self, tenant: str, event: object) -> None: ...

    def reply(self, subject: str, result: StepResult) -> None: ...


def test_a_step_finds_its_target_full_when_hardly_a_slot_is_free() -> None:
    queue = Queue("home", Kind.TOOL, "echo", Lane.STANDARD)
    for slots, full_from in ((1, 0), (2, 1), (4, 2), (16, 11)):
        lanes = TargetLanes(slots, [queue], lambda held: None)
        found = []
        for _ in range(slots + 2):
            held: Any = SimpleNamespace(lane=lanes.lanes[0], delivery=SimpleNamespace(pending=0), found_full=False)
            lanes.offer(held)
            found.append(held.found_full)
        assert found == [running >= full_from for running in range(slots + 2)]


class Echo:
    async def execute(self, work: Work) -> Payload:
        return work.step.input


@pytest.mark.parametrize(
    ("attempt", "reply_to", "found_full", "told_us"),
    [
        (1, "nl.reply.g.x", True, 350_000),
        (1, "nl.reply.g.x", False, 50_000),
        (2, "nl.reply.g.x", True, 100_000),
        (1, "", True, 100_000),
    ],
)
async def test_each_result_tells_the_average_with_its_own_wait_but_not_that_of_jobs_and_repeats(
    attempt: int, reply_to: str, found_full: bool, told_us: int
) -> None:
    """The wait is that at the server, 500 ms, and that for a slot, 100 ms; with free slots it was the way. Another's waited 100 ms."""
    clock, bus, outcomes = ManualClock(), Bus(), Outcomes("home", "w1")
    life = StepLife(
        Config(),
        cast(WorkerBus, bus),
        cast(Executor, Echo()),
        outcomes,
        clock,
        lambda: 0.0,
        lambda target: None,
        lambda held, result: None,
    )
    life.bind(asyncio.get_running_loop())
    outcomes.waits.add("echo", 100_000, clock.now_s())
    outcomes.waits.add("other", 77, clock.now_s())
    step = Step("s1", "acme", Kind.TOOL, "echo", Payload(), clock.wall_s() + 60)
    delivery: Any = SimpleNamespace(
        step=step,
        queue=Queue("home", step.kind, step.target, step.lane),
        attempt=attempt,
        again=attempt > 1,
        queued_us=500_000,
        reply_to=reply_to,
        answered_by_commit=False,
        pending=0,
        ack=lambda: None,
    )
    held = Held(cast(Delivery, delivery), cast(WorkerLane, None), clock)
    held.found_full = found_full
    clock.advance(0.1)
    await life.live(held, Target(Kind.TOOL, "echo"))
    result = bus.results["s1"]
    assert result.queue_us == pytest.approx(600_000, abs=2)
    assert result.worker_wait_us == pytest.approx(told_us, abs=2)

"""What waits in a worker that batches for a model itself, and which of it is executed next."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.containment import Containment
from gateway.policy import BatchView, Named, OnError, Slot
from workers.batch_queue import LEAST_WAIT_S, MOST_RATES, BatchQueue, Entry, Execution

INF = float("inf")


@dataclass
class FakePolicy:
    answer: Callable[[BatchView], float]
    views: list[BatchView] = field(default_factory=list)
    batches: list[tuple[int, float]] = field(default_factory=list)

    def wait_s(self, view: BatchView, now_s: float) -> float:
        self.views.append(view)
        return self.answer(view)

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        self.batches.append((size, service_s))


def make(
    answer: Callable[[BatchView], float] = lambda view: 0.0, *, instances: int = 1, max_size: int = 4, slots: int = 100
) -> tuple[BatchQueue[str], FakePolicy]:
    policy = FakePolicy(answer)
    named = Named("p", Slot.BATCHING, policy, OnError.ADMIT)
    return BatchQueue(
        named, Containment(lambda named, what: None, lambda: 0.0), instances=instances, max_size=max_size, slots=slots
    ), policy


def add(queue: BatchQueue[str], items: str, now_s: float = 0.0, *, key: str = "k", rows: int = 1, deadline_s: float = 100.0) -> None:
    for item in items:
        queue.add(item, key, rows, now_s, deadline_s)


def taken(queue: BatchQueue[str], now_s: float) -> str:
    execution = queue.take(now_s)
    return "".join(entry.item for entry in execution.entries) if execution is not None else ""


def test_no_more_executions_than_instances_and_what_waits_meanwhile_goes_together() -> None:
    queue, policy = make(instances=2)
    add(queue, "a")
    first = queue.take(0.0)
    add(queue, "b")
    assert taken(queue, 0.0) == "b"
    add(queue, "cde")
    assert queue.take(0.0) is None
    assert queue.waiting == 3
    assert [view.idle_slots for view in policy.views] == [2, 1]  # nobody is asked when nothing could start
    assert first is not None
    queue.ended(first, 0.5, sample=True)
    assert policy.batches == [(1, 0.5)]
    assert taken(queue, 0.5) == "cde"
    assert queue.waiting == 0


def test_what_the_policy_sees_and_when_it_is_asked_again() -> None:
    queue, policy = make(lambda view: 0.25 if view.size < 3 else 0.0)
    add(queue, "a", 1.0, deadline_s=9.0)
    assert queue.take(1.0) is None
    assert queue.again_s == 1.25
    add(queue, "b", 1.5, deadline_s=5.0)
    assert queue.take(1.5) is None
    add(queue, "c", 2.0, deadline_s=7.0)
    assert taken(queue, 2.0) == "abc"
    assert queue.again_s == INF
    shown = [(view.size, view.max_size, view.oldest_wait_s, view.least_slack_s) for view in policy.views]
    assert shown == [(1, 4, 0.0, 8.0), (2, 4, 0.5, 3.5), (3, 4, 1.0, 3.0)]
    assert policy.views[-1].arrivals_per_s == pytest.approx(2.5, rel=0.5)


@pytest.mark.parametrize(
    ("items", "rows", "deadline_s", "slots", "goes"),
    [
        ("abcd", 1, 100.0, 100, "abcd"),  # full
        ("abcdef", 1, 100.0, 100, "abcd"),
        ("ab", 3, 100.0, 100, "a"),  # the next one would not fit
        ("a", 9, 100.0, 100, "a"),  # more rows than there may be: the model server says so
        ("ab", 1, 5.0, 100, "ab"),  # no time left
        ("ab", 1, 100.0, 2, "ab"),  # nothing could join them
        ("ab", 1, 100.0, 3, ""),
    ],
)
def test_what_can_gain_nothing_goes_without_asking(items: str, rows: int, deadline_s: float, slots: int, goes: str) -> None:
    queue, policy = make(lambda view: 10.0, slots=slots)
    add(queue, items, rows=rows, deadline_s=deadline_s)
    assert taken(queue, 5.0) == goes
    assert len(policy.views) == (0 if goes else 1)


def test_different_keys_never_share_an_execution_and_the_oldest_goes_first() -> None:
    queue, _ = make(instances=3)
    add(queue, "a", 0.0, key="x")
    add(queue, "b", 1.0, key="y")
    add(queue, "c", 2.0, key="x")
    assert [taken(queue, 3.0) for _ in range(3)] == ["ac", "b", ""]


def test_a_key_that_waits_does_not_hold_up_another() -> None:
    queue, _ = make(lambda view: 1.0 if view.size < 2 else 0.0, instances=2)
    add(queue, "a", 0.0, key="x")
    add(queue, "bc", 0.5, key="y")
    assert taken(queue, 0.5) == "bc"
    assert queue.take(0.5) is None
    assert queue.again_s == 1.5


def test_a_removed_step_is_in_no_execution() -> None:
    queue, _ = make()
    entry = queue.add("a", "k", 1, 0.0, 9.0)
    add(queue, "b")
    assert queue.remove(entry)
    assert not queue.remove(entry)
    assert taken(queue, 0.0) == "b"
    assert not queue.remove(entry)


@pytest.mark.parametrize(("answer", "again_s"), [(0.0008, 1.0 + LEAST_WAIT_S), (1e9, 3.0), (INF, 3.0)])
def test_waits_are_no_finer_than_timers_and_not_beyond_the_first_deadline(answer: float, again_s: float) -> None:
    queue, _ = make(lambda view: answer)
    add(queue, "a", deadline_s=3.0)
    assert queue.take(1.0) is None
    assert queue.again_s == again_s


def test_the_rest_of_a_rounding_error_is_not_waited_for() -> None:
    queue, _ = make(lambda view: 1e-12)
    add(queue, "a")
    assert taken(queue, 0.0) == "a"


def test_a_policy_that_fails_sends_at_once() -> None:
    queue, _ = make(lambda view: 1 / 0)
    add(queue, "ab")
    assert taken(queue, 0.0) == "ab"


def test_rates_are_kept_by_key_and_bounded() -> None:
    queue, policy = make(lambda view: 0.0, instances=10_000, slots=10_000)
    for number in range(400):
        now_s = number / 100
        queue.add("a", "often", 1, now_s, INF)
        queue.add("b", f"once {number}", 1, now_s, INF)
        while queue.take(now_s) is not None:
            pass
    assert len(queue._rates) <= MOST_RATES
    assert [view.arrivals_per_s for view in policy.views[-2:]] == [pytest.approx(100, rel=0.1), 0.0]


@settings(deadline=None, max_examples=200)
@given(
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 2), st.integers(1, 6)),
            st.tuples(st.just("take"), st.floats(0, 1), st.none()),
            st.tuples(st.just("end"), st.integers(0, 5), st.none()),
            st.tuples(st.just("remove"), st.integers(0, 20), st.none()),
        ),
        max_size=80,
    ),
    waits=st.lists(st.sampled_from([0.0, 0.5, 5.0, INF]), min_size=1, max_size=7),
    instances=st.integers(1, 3),
)
def test_nothing_is_lost_or_taken_twice(moves: list[tuple[str, float, int]], waits: list[float], instances: int) -> None:
    queue, policy = make(lambda view: waits[len(policy.views) % len(waits)], instances=instances, slots=30)
    now_s = 0.0
    entries: list[Entry[str]] = []
    running: list[Execution[str]] = []
    gone: set[str] = set()
    for move, value, rows in moves:
        if move == "add":
            entries.append(queue.add(str(len(entries)), int(value), rows, now_s, now_s + 3.0))
        elif move == "remove" and value < len(entries) and queue.remove(entries[int(value)]):
            gone.add(entries[int(value)].item)
        elif move == "take":
            now_s += value
            if (execution := queue.take(now_s)) is not None:
                running.append(execution)
                assert len(running) <= instances
                assert len({entry.key for entry in execution.entries}) == 1
                assert execution.size <= 4 or len(execution.entries) == 1
                for entry in execution.entries:
                    assert entry.item not in gone
                    gone.add(entry.item)
        elif move == "end" and value < len(running):
            queue.ended(running.pop(int(value)), now_s, sample=True)
    now_s += 4.0  # past every deadline: whatever waits goes as soon as it may
    while queue.waiting:
        for execution in running:
            queue.ended(execution, now_s, sample=False)
        running = []
        while (execution := queue.take(now_s)) is not None:
            running.append(execution)
            gone |= {entry.item for entry in execution.entries}
        assert running
    assert gone == {entry.item for entry in entries}

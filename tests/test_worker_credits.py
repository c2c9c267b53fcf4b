"""The rule by which a worker asks for messages."""

from hypothesis import given
from hypothesis import strategies as st

from workers.credits import AHEAD, QueueLoad, plan

loads = st.lists(st.builds(QueueLoad, *[st.integers(0, 40)] * 3), min_size=1, max_size=9)


@given(st.integers(-5, 0), loads)
def test_nothing_is_asked_without_a_free_slot(free: int, queues: list[QueueLoad]) -> None:
    assert plan(free, queues) == [0] * len(queues)


@given(st.integers(1, 64), loads)
def test_every_queue_has_a_credit_while_a_slot_is_free(free: int, queues: list[QueueLoad]) -> None:
    assert all(credits >= 1 for credits in plan(free, queues))


@given(st.integers(1, 64), loads)
def test_new_credits_beyond_one_for_each_queue_stay_within_the_free_slots(free: int, queues: list[QueueLoad]) -> None:
    planned = plan(free, queues)
    granted = [max(credits - max(load.outstanding, 1), 0) for credits, load in zip(planned, queues, strict=True)]
    held = sum(max(load.outstanding - 1, 0) for load in queues)
    assert sum(granted) <= max(free - 1 - held, 0)


@given(st.integers(1, 64), loads)
def test_no_queue_gets_more_than_its_demand(free: int, queues: list[QueueLoad]) -> None:
    for credits, load in zip(plan(free, queues), queues, strict=True):
        assert credits <= max(load.demand, 1)


@given(st.integers(1, 64), loads)
def test_earlier_queues_come_first(free: int, queues: list[QueueLoad]) -> None:
    """A queue gets new credits only when those before it have what they demand."""
    planned = plan(free, queues)
    for index, (credits, load) in enumerate(zip(planned, queues, strict=True)):
        if credits > max(load.outstanding, 1):
            before = zip(planned[:index], queues[:index], strict=True)
            assert all(earlier >= one.demand for earlier, one in before)


@given(
    st.integers(1, 16),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["arrive", "finish"])), max_size=120),
    st.lists(st.integers(0, 30), min_size=6, max_size=6),
)
def test_a_simulated_worker_holds_a_bounded_number(slots: int, moves: list[tuple[int, str]], backlog: list[int]) -> None:
    """However messages come and steps finish, what is held beyond the slots stays below slots plus one for each queue."""
    outstanding, in_hand, waiting_at_server = [0] * 6, [0] * 6, list(backlog)

    def ask() -> None:
        now = [QueueLoad(*one) for one in zip(outstanding, in_hand, waiting_at_server, strict=True)]
        for index, credits in enumerate(plan(slots - sum(in_hand), now)):
            outstanding[index] = max(outstanding[index], credits)

    ask()
    for index, move in moves:
        if move == "arrive" and outstanding[index]:
            outstanding[index] -= 1
            in_hand[index] += 1
            waiting_at_server[index] = max(waiting_at_server[index] - 1, 0)
        elif move == "finish" and in_hand[index]:
            in_hand[index] -= 1
        ask()
        assert sum(in_hand) <= slots + (slots - 1) + 6


def test_a_busy_lane_gets_all_slots_of_idle_ones() -> None:
    busy = QueueLoad(outstanding=1, recent=0, pending=100)
    idle = QueueLoad(outstanding=1, recent=0, pending=0)
    assert plan(16, [idle, busy, idle]) == [1, 16, 1]


def test_a_lane_in_closed_loop_keeps_its_credits_without_a_backlog() -> None:
    assert plan(32, [QueueLoad(outstanding=2, recent=5, pending=0)]) == [AHEAD * 5]


def test_urgent_before_patient_when_both_have_a_backlog() -> None:
    urgent, patient = QueueLoad(1, 0, 6), QueueLoad(1, 0, 100)
    assert plan(10, [urgent, patient]) == [6, 5]

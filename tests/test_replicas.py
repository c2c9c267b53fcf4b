"""Which replica gets a step, which replicas agree, and when one that refused is asked again."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.replicas import Pause, agreed, capacity, choose

NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1, max_size=8)
RUN = st.text("xyz0123", min_size=1, max_size=4)


@given(NAMES, RUN, st.randoms())
def test_a_run_stays_where_it_is_whatever_the_order(names: list[str], run: str, order: object) -> None:
    chosen = choose(dict.fromkeys(names, 0), run)
    order.shuffle(names)  # type: ignore[attr-defined]
    assert choose(dict.fromkeys(names, 0), run) == chosen
    assert choose(dict.fromkeys(names, 7), run) == chosen, "all are equally loaded"


@given(NAMES.filter(lambda names: len(names) > 1), st.lists(RUN, max_size=30))
def test_a_replica_that_leaves_moves_only_its_own_runs(names: list[str], runs: list[str]) -> None:
    for run in runs:
        before = choose(dict.fromkeys(names, 0), run)
        after = choose(dict.fromkeys(names[1:], 0), run)
        assert after == before or before == names[0]


@given(NAMES, st.lists(st.tuples(st.sampled_from(["", "one", "two", "three"]), st.booleans()), max_size=80))
def test_no_choice_goes_beyond_the_bound(names: list[str], steps: list[tuple[str, bool]]) -> None:
    in_flight = dict.fromkeys(names, 0)
    for run, ends in steps:
        chosen = choose(in_flight, run)
        in_flight[chosen] += 1
        total = sum(in_flight.values())
        assert in_flight[chosen] <= capacity(total, len(names))
        assert in_flight[chosen] < 1.25 * total / len(names) + 1
        if ends:
            in_flight[max(in_flight, key=in_flight.__getitem__)] -= 1


def test_runs_are_spread_and_one_beyond_the_bound_goes_to_the_least_loaded() -> None:
    counts = Counter(choose({"a": 0, "b": 0, "c": 0}, f"r{number}") for number in range(3000))
    assert all(850 < count < 1150 for count in counts.values())
    own = choose({"a": 0, "b": 0, "c": 0}, "r")
    first, second = (name for name in "abc" if name != own)
    assert choose({own: 3, first: 3, second: 2}, "r") == own  # 4 of 9: ceil(1.25 * 3)
    assert choose({own: 4, first: 3, second: 1}, "r") == second


def test_without_a_run_the_least_loaded_and_of_equals_the_first() -> None:
    assert choose({"b": 1, "a": 1, "c": 2}, "") == "b"
    assert choose({"b": 1, "a": 0, "c": 2}, "") == "a"
    with pytest.raises(ValueError):
        choose({}, "")


@given(st.lists(st.sampled_from("pqr"), min_size=1, max_size=7), st.sampled_from([None, "p", "q", "z"]))
def test_what_most_say_holds_and_of_equals_what_holds_now(contracts: list[str], now: str | None) -> None:
    chosen, counts = agreed(contracts, now), Counter(contracts)
    assert counts[chosen] == max(counts.values())
    if counts[now or ""] == counts[chosen]:
        assert chosen == now
    else:
        assert chosen == next(one for one in contracts if counts[one] == counts[chosen])


def test_pauses_double_up_to_five_seconds() -> None:
    pause, now_s, lengths = Pause(), 100.0, []
    assert pause.is_over(now_s)
    for _ in range(8):
        pause.refused(now_s, 1.0)
        pause.refused(now_s + 0.001, 1.0)  # one that was sent before
        begun_s = now_s
        while not pause.is_over(now_s):
            now_s += 0.01
        lengths.append(now_s - begun_s)
    assert lengths == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], abs=0.02)
    pause.refused(now_s, 0.0)
    assert pause.is_over(now_s + 3.76)

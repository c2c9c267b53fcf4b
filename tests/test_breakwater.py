"""Breakwater: the pool follows the wait, and sessions share it."""

import random

import pytest

from gateway import CreditView
from plugins.breakwater import Breakwater, BreakwaterConfig

CONFIG = BreakwaterConfig(
    target_wait_s=0.1, interval_s=1.0, initial_credits=100, min_credits=10, max_credits=200, max_window=64, idle_window=8
)


def view(outstanding: int = 0, granted: int = 0, sessions: int = 1, wait_s: float = 0.0) -> CreditView:
    return CreditView("acme", sessions, 1, granted, outstanding, wait_s)


def adjusted(policy: Breakwater, wait_s: float, sessions: int = 50, times: int = 1) -> float:
    start_s = policy._adjusted_s or 0.0
    policy.window(view(sessions=sessions, wait_s=wait_s), start_s)
    for n in range(1, times + 1):
        policy.window(view(sessions=sessions, wait_s=wait_s), start_s + n * CONFIG.interval_s)
    return policy.credits


def test_the_pool_grows_by_a_share_of_the_sessions_below_the_target() -> None:
    assert adjusted(Breakwater(CONFIG), 0.05) == 100 + 0.1 * 50
    assert adjusted(Breakwater(CONFIG), 0.05, sessions=2) == 101  # by one at least
    assert adjusted(Breakwater(CONFIG), 0.05, times=1000) == 200


@pytest.mark.parametrize(("wait_s", "expected"), [(0.1, 100), (0.2, 98), (0.6, 90), (2.6, 50), (100.0, 50)])
def test_the_pool_shrinks_with_the_excess_over_the_target(wait_s: float, expected: float) -> None:
    assert adjusted(Breakwater(CONFIG), wait_s) == pytest.approx(expected)
    assert adjusted(Breakwater(CONFIG), 100.0, times=20) == 10


def test_it_is_adjusted_once_an_interval() -> None:
    policy = Breakwater(CONFIG)
    for n in range(100):
        policy.window(view(wait_s=1.0), n / 100)
    assert policy.credits == 100


@pytest.mark.parametrize(
    ("asked", "window"),
    [
        (view(), 8),  # an idle session gets little, even from a full pool
        (view(outstanding=20, granted=20), 40),  # a busy one at most twice what it has outstanding
        (view(outstanding=30, granted=90, sessions=5), 32),  # (100 - 90) / 5
        (view(outstanding=30, granted=99, sessions=5), 30),  # a pool that is all but empty: those above the equal share do not grow
        (view(outstanding=5, granted=99, sessions=5), 6),  # those below do
        (view(outstanding=5, granted=200, sessions=5), 6),
        (view(outstanding=30, granted=200, sessions=5), 30),
        (view(outstanding=0, granted=500, sessions=400), 1),
        (view(outstanding=60, granted=60), 64),
        (view(outstanding=90, granted=90), 64),
    ],
)
def test_windows(asked: CreditView, window: int) -> None:
    assert Breakwater(CONFIG).window(asked, 0.0) == window


def test_greedy_sessions_come_to_equal_shares_of_the_pool() -> None:
    """Each sends at once what it may; credits are renewed when the last one was used and when an answer was written, in random order."""
    draw = random.Random(7)
    policy = Breakwater(CONFIG)
    held = [64, 30, 6, *[0] * 7]

    def renew(one: int) -> None:
        held[one] = max(held[one], policy.window(view(held[one], sum(held), len(held)), 0.0))

    for _ in range(5000):
        one = draw.choices(range(10), weights=[1 + credits for credits in held])[0]
        held[one] = max(0, held[one] - 1)  # an answer was written
        renew(one)
        renew(one)  # and what that allowed was sent
    assert sum(held) <= 100 + len(held)
    assert min(held) >= 7
    assert max(held) <= 13


def test_parameters_change_while_the_pool_stays_within_its_bounds() -> None:
    policy = Breakwater(CONFIG)
    policy.reconfigure(BreakwaterConfig(initial_credits=20, max_credits=50, max_window=4, idle_window=4))
    assert policy.credits == 50
    assert policy.window(view(outstanding=10, granted=10), 0.0) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_wait_s": 0.0},
        {"interval_s": -1.0},
        {"min_credits": 0},
        {"initial_credits": 1},
        {"max_credits": 5},
        {"max_window": 0},
        {"idle_window": 2000},
        {"increase": 0.0},
        {"decrease": 1.0},
    ],
)
def test_wrong_parameters_are_said(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        BreakwaterConfig(**wrong)  # type: ignore[arg-type]

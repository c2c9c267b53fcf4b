"""The batching experiment itself: its two simulations were written apart, and must agree where they simulate the same."""

from itertools import accumulate

import pytest

from gateway.core.containment import Containment
from gateway.policy import Named, OnError, Slot
from plugins.fixed_window import FixedWindow, FixedWindowConfig
from tests.lab.c1_batching import SCENARIO, policy_of, triton, worker
from tests.lab.engine import Simulation
from tests.lab.scenario import Stack

COST = (0.02, 0.002, 1)


def arrivals(rate_per_s: float, rows: int = 2000) -> list[float]:
    source = Simulation(3).random
    return list(accumulate(source.expovariate(rate_per_s) for _ in range(rows)))


def with_window(delay_s: float, times: list[float], cost: tuple[float, float, int]) -> float:
    named = Named("window", Slot.BATCHING, FixedWindow(FixedWindowConfig(delay_s=delay_s)), OnError.ADMIT)
    return worker(named, Containment(lambda named, what: None, lambda: 0.0), Simulation(1), times, cost)


@pytest.mark.parametrize("rate_per_s", [20.0, 150.0, 280.0])
@pytest.mark.parametrize(("delay_s", "tolerance"), [(0.0, 1e-9), (0.02, 0.01)])  # the worker's timers are no finer than a millisecond
@pytest.mark.parametrize("instances", [1, 3])
def test_the_workers_queue_with_a_fixed_window_is_tritons_batcher(
    rate_per_s: float, delay_s: float, tolerance: float, instances: int
) -> None:
    times, cost = arrivals(instances * rate_per_s), (*COST[:2], instances)
    assert with_window(delay_s, times, cost) == pytest.approx(triton(delay_s, times, cost), rel=tolerance)


def test_alone_a_row_takes_what_an_execution_of_one_takes() -> None:
    times = [float(second) for second in range(50)]
    assert with_window(0.0, times, COST) == pytest.approx(0.022)
    assert triton(0.005, times, COST) == pytest.approx(0.027)


def test_a_quick_run_has_a_verdict_for_each_load_and_fails_its_controls() -> None:
    stack = Stack().with_({"use": "passthrough"}, {"use": "marginal"})
    measured = [one for one in SCENARIO.run(stack, 1, True) if "2 instances" not in one.workload]
    ours = [one for one in measured if not one.control]
    assert {one.policy for one in ours} == {"marginal"}
    assert len(ours) == 20
    assert all(one.target is not None and one.value < 1.05 for one in ours)
    assert all(one.target is not None and one.value > one.target for one in measured if one.control)


def test_without_a_policy_for_such_models_there_is_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="no batching policy"):
        policy_of(Stack().with_({"use": "passthrough"}), lambda: 0.0, 1)

"""Ordering policies: which step of a flow goes first."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from gateway.core.containment import Containment, an_order
from gateway.core.permit import Permit
from gateway.core.tier_queue import TierQueue
from gateway.policy import Named, OrderingPolicy, ScopeView
from gateway.types import Flow, Kind, Lane
from plugins.adaptive_lifo import AdaptiveLifo, AdaptiveLifoConfig
from plugins.edf import Edf, EdfConfig

FLOW = Flow("a", "x", Kind.TOOL, Lane.STANDARD)
VIEW = ScopeView("tool.x", 4, 4, 3, 0.0, 10.0)


def order(policy: OrderingPolicy, steps: Sequence[tuple[str, float, float, float]]) -> str:
    """steps: name, arrival, deadline, and for how long the oldest one waits by then. The names as they come out of the queue."""

    def report(named: Named, what: str) -> None:
        raise AssertionError(what)

    queue = TierQueue(None, Containment(report, lambda: 0.0))
    for name, arrived_s, deadline_s, oldest_wait_s in steps:
        flow = replace(FLOW, run=name, deadline_s=deadline_s)
        key = policy.key(flow, arrived_s, replace(VIEW, oldest_wait_s=oldest_wait_s))
        queue.add(Permit(flow, arrived_s), an_order(key), arrived_s)
    return "".join(queue.next(100.0).flow.run for _ in steps)


def test_edf_takes_the_earliest_deadline_and_equal_ones_by_arrival() -> None:
    assert order(Edf(EdfConfig()), [("a", 1, 9, 0), ("b", 2, 4, 0), ("c", 3, 7, 0), ("d", 4, 4, 0)]) == "bdca"


def test_edf_steps_without_a_deadline_are_first_come_first_served_and_due_after_the_patience() -> None:
    steps = [("a", 1.0, math.inf, 0.0), ("b", 2.0, 50.0, 0.0), ("c", 3.0, 5.0, 0.0), ("d", 4.0, math.inf, 0.0)]
    policy = Edf(EdfConfig(patience_s=10.0))
    assert order(policy, steps) == "cadb"
    policy.reconfigure(EdfConfig(patience_s=100.0))
    assert order(policy, steps) == "cbad"


def test_adaptive_lifo_is_first_come_first_served_up_to_the_target() -> None:
    steps = [(name, at_s, math.inf, 0.1) for at_s, name in enumerate("abcd")]
    assert order(AdaptiveLifo(AdaptiveLifoConfig(target_s=0.1)), steps) == "abcd"


def test_adaptive_lifo_turns_round_while_overloaded() -> None:
    steps = [("a", 1.0, math.inf, 0.0), ("b", 2.0, math.inf, 0.05), ("c", 3.0, math.inf, 0.5), ("d", 4.0, math.inf, 1.5)]
    steps.append(("e", 5.0, math.inf, 0.0))
    policy = AdaptiveLifo(AdaptiveLifoConfig(target_s=0.1))
    assert order(policy, steps) == "dcabe"
    policy.reconfigure(AdaptiveLifoConfig(target_s=1.0))
    assert order(policy, steps) == "dabce"


def test_values_out_of_range_are_refused() -> None:
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="must be"):
            EdfConfig(patience_s=wrong)
    with pytest.raises(ValueError, match="must be"):
        AdaptiveLifoConfig(target_s=0.0)

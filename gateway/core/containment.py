"""Calling policies with care: one that raises, answers nonsense or is slow is answered for, counted and reported.

A slow call cannot be interrupted, so it counts afterwards: a policy whose calls over BUDGET_S take MOST_SLOW_S of WINDOW_S together is
suspended for SUSPENDED_S and answered for meanwhile. Less than that is as likely the machine, which can stop a process at any time.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from gateway.policy import ADMIT, Admit, Decision, Named, OnError, Reject
from gateway.types import TIERS, Flow

BUDGET_S = 0.005
MOST_SLOW_S = 1.0
WINDOW_S = 10.0
SUSPENDED_S = 10.0

_DECISION = (Admit, Reject)  # a union would be made anew by each call
_NUMBER = (int, float)

Report = Callable[[Named, str], None]
Check = Callable[[Any], Any]


class Containment:
    """`counts` has, by policy name and event: faults, slow, suspended, rejected, shadow_rejected."""

    def __init__(self, report: Report, now_s: Callable[[], float], budget_s: float = BUDGET_S) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._report = report
        self._now_s = now_s
        self._budget_s = budget_s
        self._slow: dict[str, tuple[float, float]] = {}  # by policy: when its window began, and the time of its slow calls since
        self._suspended: dict[str, float] = {}  # until when

    def call(self, named: Named, method: str, check: Check | None, default: Any, *arguments: Any) -> Any:
        """What the policy's method answers; default when it fails. check(answer) raises TypeError or ValueError for nonsense."""
        if self._suspended and self.is_suspended(named):
            return default
        return self._call(named, method, check, default, *arguments)

    def tell(self, named: Named, method: str, *arguments: Any) -> None:
        """For what undoes an earlier call: also while the policy is suspended, or what it reserved would be lost for ever."""
        self._call(named, method, None, None, *arguments)

    def _call(self, named: Named, method: str, check: Check | None, default: Any, *arguments: Any) -> Any:
        began_s = self._now_s()
        try:
            answer = getattr(named.policy, method)(*arguments)
            if check is not None:
                answer = check(answer)
        except Exception as error:
            self.counts[named.name, "faults"] += 1
            self._report(named, f"{method}() raised {type(error).__name__}: {error}")
            answer = default
        took_s = self._now_s() - began_s
        if took_s > self._budget_s:
            self._was_slow(named, method, took_s, began_s)
        return answer

    def decide(self, named: Named, method: str, *arguments: Any) -> Decision | None:
        """A decision about a step; None when the policy made none: then `failed(named)` is the decision."""
        decision: Decision | None = self.call(named, method, a_decision, None, *arguments)
        return decision

    def count(self, named: Named, event: str) -> None:
        self.counts[named.name, event] += 1

    def is_suspended(self, named: Named) -> bool:
        until_s = self._suspended.get(named.name)
        if until_s is None:
            return False
        if self._now_s() < until_s:
            return True
        del self._suspended[named.name]
        return False

    def _was_slow(self, named: Named, method: str, took_s: float, now_s: float) -> None:
        self.counts[named.name, "slow"] += 1
        began_s, slow_s = self._slow.get(named.name, (now_s, 0.0))
        began_s, slow_s = (began_s, slow_s + took_s) if now_s - began_s < WINDOW_S else (now_s, took_s)
        self._slow[named.name] = (began_s, slow_s)
        if slow_s < MOST_SLOW_S:
            return
        del self._slow[named.name]
        self._suspended[named.name] = now_s + took_s + SUSPENDED_S
        self.counts[named.name, "suspended"] += 1
        self._report(
            named,
            f"{method}() took {took_s * 1e3:.1f} ms, and calls over {self._budget_s * 1e3:g} ms took {slow_s:.1f} s of {WINDOW_S:.0f} s:"
            f" it is not asked for {SUSPENDED_S:.0f} s",
        )


def failed(named: Named) -> Decision:
    """What happens to a step about which the policy could not decide."""
    if named.on_error is OnError.ADMIT:
        return ADMIT
    return Reject("POLICY_FAILED", f"policy {named.name} failed and is configured to reject then", scope=named.name)


# ---- what answers must look like -----------------------------------------------------------------------------------------------


def a_decision(answer: Any) -> Decision:
    if not isinstance(answer, _DECISION):
        raise TypeError(f"it returned {type(answer).__name__}, not Admit or Reject")
    if isinstance(answer, Reject):
        if not all(isinstance(text, str) for text in (answer.reason, answer.message, answer.scope)):
            raise TypeError(f"it returned {answer!r}, whose reason, message and scope must be text")
        a_hint(answer.retry_after_s)
    return answer


def a_hint(answer: Any) -> float | None:
    hint_s = None if answer is None else a_time(answer)
    if hint_s == float("inf"):
        raise TypeError("it returned an endless time to wait; None stands for an unknown one")
    return hint_s


def a_flow_of(flow: Flow) -> Check:
    """The flow that a classifier makes of another: it may change what the step counts as, not whose it is or what it is for."""

    def check(answer: Any) -> Flow:
        if not isinstance(answer, Flow):
            raise TypeError(f"it returned {type(answer).__name__}, not a Flow")
        if (answer.tenant, answer.kind, answer.target) != (flow.tenant, flow.kind, flow.target):
            raise ValueError("it changed tenant, kind or target, which are the step's own")
        if type(answer.tier) is not int or not isinstance(answer.run, str) or answer.deadline_s != answer.deadline_s:
            raise TypeError(f"tier {answer.tier!r}, run {answer.run!r} or deadline_s {answer.deadline_s!r} is of the wrong kind")
        if answer.tier not in range(TIERS) or not 0 < answer.cost < float("inf"):
            raise ValueError(f"tier {answer.tier!r} or cost {answer.cost!r} is out of range")
        return answer

    return check


def a_count(answer: Any) -> int:
    """A whole number of at least 1; a limit below that would stop everything for ever."""
    if not isinstance(answer, _NUMBER) or isinstance(answer, bool) or not 1 <= answer < 1e9:  # also refuses nan
        raise TypeError(f"it returned {answer!r}, not a number from 1 to a billion")
    return int(answer)


def a_time(answer: Any) -> float:
    if not isinstance(answer, _NUMBER) or isinstance(answer, bool) or not answer >= 0:
        raise TypeError(f"it returned {answer!r}, not seconds of at least 0")
    return float(answer)


def a_time_or_none(answer: Any) -> float | None:
    return None if answer is None else a_time(answer)


def a_number_or_none(answer: Any) -> float | None:
    if answer is not None and (not isinstance(answer, _NUMBER) or answer != answer):
        raise TypeError(f"it returned {answer!r}, not a number or None")
    return answer


def a_probability(answer: Any) -> float:
    if not isinstance(answer, _NUMBER) or not 0 <= answer <= 1:
        raise TypeError(f"it returned {answer!r}, not a number from 0 to 1")
    return float(answer)


def an_order(answer: Any) -> tuple[float, ...]:
    if not isinstance(answer, tuple) or not all(isinstance(part, _NUMBER) and part == part for part in answer):
        raise TypeError(f"it returned {answer!r}, not a tuple of numbers")
    return answer


def a_key(answer: Any) -> Any:
    hash(answer)
    return answer


def a_truth(answer: Any) -> bool:
    if not isinstance(answer, bool):
        raise TypeError(f"it returned {answer!r}, not True or False")
    return answer

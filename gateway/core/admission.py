"""The admission chain: policies in the order of the configuration, the first Reject wins, reservations are undone in reverse."""

from collections.abc import Callable, Sequence
from typing import Any

from gateway.core.faults import Faults
from gateway.policy import Admit, Named, Reject, Sample, ScopeView
from gateway.types import Flow

Reservations = list[tuple[Named, Any]]


class AdmissionChain:
    def __init__(self, policies: Sequence[Named], faults: Faults, random: Callable[[], float]) -> None:
        self._policies = tuple(policies)
        self._faults = faults
        self._random = random

    def enter(self, flow: Flow, view: ScopeView, now_s: float) -> tuple[Reservations, Reject | None, str]:
        """Returns what was reserved, the rejection if there is one, and the name of the policy that made it."""
        reserved: Reservations = []
        for named in self._policies:
            try:
                decision = named.policy.decide(flow, view, now_s, self._random())
                if not isinstance(decision, Admit | Reject):
                    raise TypeError(f"decide() returned {type(decision).__name__}, not Admit or Reject")
            except Exception as error:
                decision = self._faults.decision(named, error)
            if isinstance(decision, Reject):
                self.release(reserved, flow, now_s)
                return [], decision, named.name
            reserved.append((named, decision.state))
        return reserved, None, ""

    def release(self, reserved: Reservations, flow: Flow, now_s: float) -> None:
        """The step was not admitted after all: everything is given back, the last reservation first."""
        for named, state in reversed(reserved):
            try:
                named.policy.release(flow, state, now_s)
            except Exception as error:
                self._faults.note(named, error)

    def ended(self, reserved: Reservations, flow: Flow, sample: Sample, now_s: float) -> None:
        for named, state in reserved:
            try:
                named.policy.ended(flow, state, sample, now_s)
            except Exception as error:
                self._faults.note(named, error)

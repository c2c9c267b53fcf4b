"""The admission chain: policies in the order of the configuration, the first Reject wins, reservations are undone in reverse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.core.containment import Containment, failed
from gateway.policy import Named, Reject, Sample, ScopeView
from gateway.types import Flow


class Reservations(list[tuple[Named, Any]]):
    """What the policies of a chain reserved, in their order. favoured: one of them says so of the step."""

    favoured = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rejection and the policy that made it."""

    reject: Reject
    policy: str


class AdmissionChain:
    def __init__(self, policies: Sequence[Named], contain: Containment, random: Callable[[], float]) -> None:
        self._policies = tuple(policies)
        self._contain = contain
        self._random = random

    def enter(self, flow: Flow, view: ScopeView, now_s: float) -> Reservations | Refusal:
        reserved = Reservations()
        for named in self._policies:
            made = self._contain.decide(named, "decide", flow, view, now_s, self._random())
            decision = failed(named) if made is None else made
            if made is None and not isinstance(decision, Reject):
                continue  # it reserved nothing, so it has nothing to undo either
            if not isinstance(decision, Reject):
                reserved.append((named, decision.state))
                if decision.favoured and not named.shadow:
                    reserved.favoured = True
            elif named.shadow:
                self._contain.count(named, "shadow_rejected")
            else:
                self._contain.count(named, "rejected")
                self.release(reserved, flow, now_s)
                return Refusal(decision, named.name)
        return reserved

    def release(self, reserved: Reservations, flow: Flow, now_s: float) -> None:
        """The step was not admitted after all: everything is given back, the last reservation first."""
        for named, state in reversed(reserved):
            self._contain.tell(named, "release", flow, state, now_s)

    def ended(self, reserved: Reservations, flow: Flow, sample: Sample, now_s: float) -> None:
        for named, state in reserved:
            self._contain.tell(named, "ended", flow, state, sample, now_s)

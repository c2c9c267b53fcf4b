"""Question: can this step still end before its deadline?

Not when the predicted time is more than what is left; then it is refused at once, before it costs a slot. Prediction from the view:

    waiting / drain rate + round trip          waiting: 0 while a slot is free

It is the time of a step that goes behind all that wait. A more important one overtakes some of them and may be quicker: a `slack` above 1
allows for that. Figures that are not known yet never refuse a step, nor is one without a deadline refused. No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import ADMIT, Decision, Flow, PolicyType, Reject, Sample, ScopeView, Slot, hookimpl


@dataclass(frozen=True)
class DeadlineConfig:
    """slack: refused when the prediction is more than the time left times this; 1.5 forgives a prediction that is half too long."""

    slack: float = 1.0

    def __post_init__(self) -> None:
        if self.slack <= 0:
            raise ValueError("slack must be positive")


def predicted_s(view: ScopeView) -> float | None:
    """How long a step that comes now will take; None while that is not known."""
    if view.round_trip_s <= 0.0:
        return None
    if view.inflight < view.limit or not view.waiting:
        return view.round_trip_s
    return view.waiting / view.drain_per_s + view.round_trip_s if view.drain_per_s > 0.0 else None


class Deadline:
    def __init__(self, config: DeadlineConfig) -> None:
        self._config = config

    def reconfigure(self, config: DeadlineConfig) -> None:
        self._config = config

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        left_s = flow.deadline_s - now_s
        needs_s = predicted_s(view)
        if needs_s is None or needs_s <= left_s * self._config.slack or not view.inflight + view.waiting:
            return ADMIT  # an idle target may try: what was expected is from another time, and only steps can correct it
        message = f"the step has {left_s:.3f} s left, and {view.scope} is expected to need {needs_s:.3f} s"
        return Reject("DEADLINE_UNREACHABLE", message, view.scope, drain_hint=True)

    def release(self, flow: Flow, state: object, now_s: float) -> None:
        """Nothing was reserved."""

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        """The view knows."""


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    summary = "refuses at once what cannot end before its deadline"
    return [PolicyType("deadline", Slot.ADMISSION, DeadlineConfig, Deadline, summary)]

"""Question: which step of a flow is most urgent?

Earliest deadline first (Liu and Layland 1973) where a deadline is set, first come first served among steps without one. To compare the
two, a step without a deadline counts as due `patience_s` after it came, so neither sort starves the other:

    key = deadline_s, or arrived_s + patience_s where there is none

Optimal for meeting deadlines while there is capacity for all of them. Under overload it spends the capacity on steps that are nearly too
late, so put an admission policy that looks at deadlines in front of it. No state.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Flow, OrderKey, PolicyType, ScopeView, Slot, hookimpl


@dataclass(frozen=True)
class EdfConfig:
    """patience_s: after which a step without a deadline counts as due."""

    patience_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.patience_s < math.inf:
            raise ValueError("patience_s must be positive and finite")


class Edf:
    def __init__(self, config: EdfConfig) -> None:
        self._config = config

    def reconfigure(self, config: EdfConfig) -> None:
        """For steps that come from now on."""
        self._config = config

    def key(self, flow: Flow, arrived_s: float, view: ScopeView) -> OrderKey:
        if math.isfinite(flow.deadline_s):
            return (flow.deadline_s,)
        return (arrived_s + self._config.patience_s,)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("edf", Slot.ORDERING, EdfConfig, Edf, "the step with the earliest deadline first")]

"""Question: with which probability is this trace recorded?

As the caller decided, when it did (W3C trace context, flag `sampled`); otherwise with a constant ratio, as OpenTelemetry's
ParentBased(TraceIdRatioBased). No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Flow, PolicyType, Slot, hookimpl


@dataclass(frozen=True)
class ParentRatioConfig:
    """ratio: of the traces that start here, 0 to 1."""

    ratio: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError("ratio must be from 0 to 1")


class ParentRatio:
    def __init__(self, config: ParentRatioConfig) -> None:
        self._ratio = config.ratio

    def reconfigure(self, config: ParentRatioConfig) -> None:
        self._ratio = config.ratio

    def probability(self, flow: Flow, upstream_sampled: bool | None, now_s: float) -> float:
        if upstream_sampled is None:
            return self._ratio
        return 1.0 if upstream_sampled else 0.0


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("parent_ratio", Slot.HEAD_SAMPLING, ParentRatioConfig, ParentRatio, "as the caller decided, else a constant ratio")]

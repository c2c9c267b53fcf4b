"""Question: how many steps of a target may be in flight?

A constant, by default for every scope (`tool.docs`, `infer.plan`) the same. By Little's law a limit of c slots times 1 + (network time /
service time) keeps all slots busy; more only makes a longer queue. No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway import PolicyType, Sample, Slot, hookimpl


@dataclass(frozen=True)
class FixedLimitConfig:
    """limit: steps in flight for each scope and gateway; `scopes` overrides it for single ones."""

    limit: int = 256
    scopes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit < 1 or any(limit < 1 for limit in self.scopes.values()):
            raise ValueError("limits must be at least 1")


class FixedLimit:
    def __init__(self, config: FixedLimitConfig) -> None:
        self._config = config

    def limit(self, scope: str) -> int:
        return self._config.scopes.get(scope, self._config.limit)

    def on_sample(self, sample: Sample, now_s: float, random: float) -> None:
        """A constant learns nothing."""

    def reconfigure(self, config: FixedLimitConfig) -> None:
        self._config = config


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("fixed_limit", Slot.LIMIT, FixedLimitConfig, FixedLimit, "a constant concurrency limit for each target")]

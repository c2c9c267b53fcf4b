"""Question: how important is a step?

There are six tiers, 0 is served first and shed last. The lane of a step gives it 1 (interactive), 3 (standard) or 5 (batch); steps of
important tenants go one tier up, to 0, 2 and 4: before others of their lane, and never before those of a better lane. No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from gateway import Flow, PolicyType, Slot, Step, hookimpl


@dataclass(frozen=True)
class TenantTiersConfig:
    """important: the tenants whose steps go one tier up."""

    important: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(self.important):
            raise ValueError("important must name tenants, and has an empty name")


class TenantTiers:
    def __init__(self, config: TenantTiersConfig) -> None:
        self.reconfigure(config)

    def reconfigure(self, config: TenantTiersConfig) -> None:
        self._important = frozenset(config.important)

    def classify(self, step: Step, flow: Flow) -> Flow:
        if flow.tier == 0 or step.tenant not in self._important:
            return flow
        return replace(flow, tier=flow.tier - 1)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("tenant_tiers", Slot.CLASSIFY, TenantTiersConfig, TenantTiers, "important tenants first within their lane")]

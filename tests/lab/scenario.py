"""What a laboratory scenario is, and the policies that it is run with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pluggy

from gateway import hookimpl, loader
from gateway.config import DEFAULT_POLICIES, parse
from gateway.core.containment import Containment
from gateway.core.permits import Permits
from gateway.core.policies import PolicySet
from gateway.policy import Named, PolicyType, Slot


@dataclass(frozen=True)
class Measured:
    """One number of one seed. A control is a policy that is known to be bad and must miss the target; no target: for reading."""

    policy: str
    workload: str
    what: str
    value: float
    target: float | None = None
    at_most: bool = True
    control: bool = False


@dataclass(frozen=True)
class Stack:
    """The [[policies]] under test, as tables, and policy types that no plugin of this configuration brings."""

    policies: tuple[Mapping[str, Any], ...] = tuple(section.model_dump(exclude_defaults=True) for section in DEFAULT_POLICIES)
    extra: tuple[PolicyType, ...] = ()
    name: str = "defaults"

    def slots(self) -> dict[str, Slot]:
        return {name: policy_type.slot for name, policy_type in self.types().items()}

    def without(self, *slots: Slot) -> "Stack":
        of = self.slots()
        return Stack(tuple(table for table in self.policies if of[table["use"]] not in slots), self.extra, self.name)

    def with_(self, *tables: Mapping[str, Any], name: str = "") -> "Stack":
        """The tables take the place of all policies of their slots."""
        of = self.slots()
        kept = self.without(*{of[table["use"]] for table in tables})
        return Stack((*kept.policies, *tables), self.extra, name or self.name)

    def set(self, use: str, **parameters: Any) -> "Stack":
        """With other parameters for one policy."""
        tables = tuple({**table, **parameters} if table["use"] == use else table for table in self.policies)
        return Stack(tables, self.extra, self.name)

    def permits(self, random: Callable[[], float], now_s: Callable[[], float] = lambda: 0.0) -> Permits:
        """A gateway's decisions. A policy that fails ends the experiment: contained faults would make a number of nothing."""
        return Permits(self.build(), Containment(_raise, now_s), random)

    def batching(self, now_s: Callable[[], float]) -> tuple[tuple[Named, ...], Containment]:
        """New objects of the batching policies, and what calls them."""
        return self.build().all(Slot.BATCHING), Containment(_raise, now_s)

    def build(self) -> PolicySet:
        return loader.build_policies(parse({"policies": list(self.policies)}), _plugins(self.extra))

    def types(self) -> dict[str, PolicyType]:
        """All that plugins bring, by name."""
        return loader.policy_types(_plugins(self.extra))


class _UnderTest:
    """The plugin that brings what no other one does."""

    def __init__(self, extra: tuple[PolicyType, ...]) -> None:
        self._extra = extra

    @hookimpl
    def nearloop_policy_types(self) -> tuple[PolicyType, ...]:
        return self._extra


@lru_cache(maxsize=8)
def _plugins(extra: tuple[PolicyType, ...]) -> pluggy.PluginManager:
    """Kept, since an experiment builds many gateways; policies are built anew each time."""
    manager = loader.find_plugins(parse({}))
    manager.register(_UnderTest(extra), "lab")
    return manager


def _raise(named: Named, what: str) -> None:
    raise AssertionError(f"policy {named.name} ({named.slot}): {what}")


@dataclass(frozen=True)
class Scenario:
    """run(stack, seed, quick) gives one seed's numbers."""

    name: str
    title: str
    run: Callable[[Stack, int, bool], list[Measured]]
    seeds: int = 5

"""The policies of a process: built from their configuration, one object or one for each scope, and configured anew while they run."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gateway.policy import SCOPED, Named, OnError, PolicyType, Slot


@dataclass(slots=True, eq=False)
class PolicyEntry:
    """A policy that the configuration names; `objects` are those that were built of it."""

    name: str
    type: PolicyType
    config: Any
    on_error: OnError
    shadow: bool = False
    objects: list[Any] = field(default_factory=list)

    @property
    def per_scope(self) -> bool:
        return self.type.slot in SCOPED or (self.type.slot is Slot.ADMISSION and self.type.per_scope)

    def named(self) -> Named:
        """Builds an object; the only one unless the entry is per scope."""
        if self.per_scope or not self.objects:
            self.objects.append(self.type.build(self.config))
        return Named(self.name, self.type.slot, self.objects[-1], self.on_error, self.shadow)

    def reconfigure(self, config: Any) -> None:
        """Later objects get it too. When one refuses it, all go back to the old one and its error is raised."""
        changed = []
        try:
            for policy in self.objects:
                changed.append(policy)
                policy.reconfigure(config)
        except Exception:
            for policy in changed:
                with suppress(Exception):  # one that cannot go back must not keep the others from it
                    policy.reconfigure(self.config)
            raise
        self.config = config


class PolicySet:
    """Policies by slot, each in the order of the configuration."""

    def __init__(self, entries: Mapping[Slot, Sequence[PolicyEntry]]) -> None:
        self.entries = {slot: tuple(of_slot) for slot, of_slot in entries.items()}

    def all(self, slot: Slot) -> tuple[Named, ...]:
        """The objects of a slot; for one that is built for each scope these are new ones, to be kept by who keeps the scope."""
        return tuple(entry.named() for entry in self.entries.get(slot, ()))

    def one(self, slot: Slot) -> Named | None:
        """The policy of a slot that has one at most."""
        return next(iter(self.all(slot)), None)

    @property
    def names(self) -> list[str]:
        return [entry.name for of_slot in self.entries.values() for entry in of_slot]

    def find(self, name: str) -> PolicyEntry | None:
        return next((entry for of_slot in self.entries.values() for entry in of_slot if entry.name == name), None)

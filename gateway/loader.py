"""Finds plugins, collects what they bring once, and builds the policies in the order of the configuration.

Plugins are the built-in ones, those of the entry point group `nearloop`, and the modules that the configuration names in `plugins`.
"""

import dataclasses
import difflib
import importlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pluggy
from pydantic import TypeAdapter, ValidationError

from gateway import hookspec
from gateway.config import Config, PolicySection
from gateway.errors import ConfigError
from gateway.policy import Named, OnError, PolicyType, Slot
from gateway.types import Target

BUILT_IN = ("token_bucket", "fixed_limit", "bounded_wait", "nearest_region", "passthrough", "parent_ratio")
# The methods that the kernel calls, by slot: an object without them is refused at start, not at the first step.
METHODS: dict[Slot, tuple[str, ...]] = {
    Slot.CLASSIFY: ("classify",),
    Slot.ADMISSION: ("decide", "release", "ended"),
    Slot.LIMIT: ("limit", "on_sample"),
    Slot.FAIRNESS: ("key", "activate", "deactivate", "pick", "charge"),
    Slot.ORDERING: ("key",),
    Slot.BACKPRESSURE: ("may_wait", "retry_after_s", "credits"),
    Slot.ROUTING: ("score", "weight"),
    Slot.BATCHING: ("wait_s", "on_batch"),
    Slot.HEAD_SAMPLING: ("probability",),
    Slot.TAIL_SAMPLING: ("keep",),
    Slot.REDACTION: ("redact",),
    Slot.OBSERVER: ("rejected", "ended"),
}
SINGLE = (Slot.FAIRNESS, Slot.ORDERING)
# Part of the contract, and asked by nobody in this version: refused rather than silently ignored.
NOT_ASKED = (Slot.TAIL_SAMPLING, Slot.REDACTION)


@dataclass(frozen=True, slots=True)
class PolicySet:
    """The policies that were built, by slot, each in the order of the configuration."""

    by_slot: dict[Slot, tuple[Named, ...]]

    def all(self, slot: Slot) -> tuple[Named, ...]:
        return self.by_slot.get(slot, ())

    def one(self, slot: Slot) -> Named | None:
        return next(iter(self.all(slot)), None)


def find_plugins(config: Config) -> pluggy.PluginManager:
    """Raises ConfigError when a plugin cannot be imported or does not keep to the contract."""
    manager = pluggy.PluginManager("nearloop")
    manager.add_hookspecs(hookspec)
    for name in BUILT_IN:
        manager.register(importlib.import_module(f"plugins.{name}"), name)
    problems = []
    try:
        manager.load_setuptools_entrypoints("nearloop")
    except Exception as error:
        problems.append(f"an installed plugin cannot be loaded: {type(error).__name__}: {error}")
    for name in config.plugins:
        try:
            manager.register(importlib.import_module(name), name)
        except Exception as error:
            problems.append(f"plugins: {name!r} cannot be loaded: {type(error).__name__}: {error}")
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        problems.append(f"plugins: {error}")
    if problems:
        raise ConfigError("plugins", problems)
    return manager


def policy_types(manager: pluggy.PluginManager) -> dict[str, PolicyType]:
    """By name. Raises ConfigError for names that are taken twice."""
    found = [policy_type for types in manager.hook.nearloop_policy_types() for policy_type in types]
    twice = [name for name, count in Counter(policy_type.name for policy_type in found).items() if count > 1]
    if twice:
        raise ConfigError("plugins", [f"policy type {name!r} is brought by more than one plugin: remove one" for name in sorted(twice)])
    return {policy_type.name: policy_type for policy_type in found}


def _build(section: PolicySection, policy_type: PolicyType) -> tuple[Any, list[str]]:
    """The policy and the problems with its parameters."""
    parameters = section.parameters
    known = [field.name for field in dataclasses.fields(policy_type.config)]
    problems = []
    for unknown in sorted(set(parameters) - set(known)):
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known) or 'no parameters'}"
        problems.append(f"unknown parameter {unknown!r}{hint}")
    if problems:
        return None, problems
    adapter = TypeAdapter(policy_type.config)
    try:
        policy = policy_type.build(adapter.validate_python(parameters))
    except ValidationError as error:
        return None, [".".join(map(str, item["loc"])) + ": " + item["msg"].removeprefix("Value error, ") for item in error.errors()]
    except Exception as error:
        return None, [f"cannot be built: {type(error).__name__}: {error}"]
    missing = [name for name in METHODS[policy_type.slot] if not hasattr(policy, name)]
    return policy, [f"lacks {', '.join(missing)}, which the slot {policy_type.slot} needs"] if missing else []


def build_policies(config: Config, manager: pluggy.PluginManager) -> PolicySet:
    """Raises ConfigError with every mistake in [[policies]]."""
    types = policy_types(manager)
    by_slot: dict[Slot, list[Named]] = {}
    problems: list[str] = []
    names: set[str] = set()
    for index, section in enumerate(config.policies):
        name = section.name or section.use
        where = f"policies.{index} ({name})"
        policy_type = types.get(section.use)
        if policy_type is None:
            close = difflib.get_close_matches(section.use, types, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(types))}"
            problems.append(f"{where}: there is no policy {section.use!r}; {hint}")
            continue
        if policy_type.slot in NOT_ASKED:
            problems.append(f"{where}: nothing asks policies of the slot {policy_type.slot} in this version: take it out")
        if name in names:
            problems.append(f"{where}: the name {name!r} is taken: give this instance a name of its own")
        names.add(name)
        policy, wrong = _build(section, policy_type)
        problems += [f"{where}: {problem}" for problem in wrong]
        on_error = OnError(section.on_error) if section.on_error else policy_type.on_error
        by_slot.setdefault(policy_type.slot, []).append(Named(name, policy_type.slot, policy, on_error))
    for slot in SINGLE:
        if len(by_slot.get(slot, ())) > 1:
            problems.append(f"policies: the slot {slot} takes one policy, there are {', '.join(n.name for n in by_slot[slot])}")
    if problems:
        raise ConfigError("policies", problems)
    return PolicySet({slot: tuple(named) for slot, named in by_slot.items()})


def plugin_targets(config: Config, manager: pluggy.PluginManager) -> tuple[Target, ...]:
    return tuple(target for targets in manager.hook.nearloop_targets(config=config) for target in targets)

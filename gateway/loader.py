"""Finds plugins, collects what they bring once, and builds the policies in the order of the configuration.

Plugins are the built-in ones, those of the entry point group `nearloop`, and the modules that the configuration names in `plugins`.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from importlib import metadata
from typing import Any, cast

import pluggy
from pydantic import TypeAdapter, ValidationError

import plugins
from gateway import hookspec, policy, subjects
from gateway.config import Config
from gateway.core.policies import PolicyEntry, PolicySet
from gateway.errors import ConfigError
from gateway.policy import OnError, PolicyType, Slot
from gateway.types import Target

BUILT_IN = tuple(sorted(module.name for module in pkgutil.iter_modules(plugins.__path__)))
# The methods that the kernel calls, by slot: an object without them is refused at start, not at the first step.
METHODS: dict[Slot, tuple[str, ...]] = {
    Slot.CLASSIFY: ("classify",),
    Slot.ADMISSION: ("decide", "release", "ended"),
    Slot.LIMIT: ("limit", "on_sample"),
    Slot.FAIRNESS: ("key", "activate", "deactivate", "pick", "charge"),
    Slot.ORDERING: ("key",),
    Slot.BACKPRESSURE: ("may_wait", "may_start", "retry_after_s"),
    Slot.CREDITS: ("window",),
    Slot.ROUTING: ("score", "chosen", "weight"),
    Slot.BATCHING: ("serves", "wait_s", "on_batch", "learnt"),
    Slot.HEAD_SAMPLING: ("probability",),
    Slot.TAIL_SAMPLING: ("keep",),
    Slot.REDACTION: ("redact",),
    Slot.OBSERVER: ("rejected", "ended"),
}
PROTOCOLS: dict[Slot, type[Any]] = {
    Slot.CLASSIFY: policy.Classifier,
    Slot.ADMISSION: policy.AdmissionPolicy,
    Slot.LIMIT: policy.LimitPolicy,
    Slot.FAIRNESS: policy.FairnessPolicy,
    Slot.ORDERING: policy.OrderingPolicy,
    Slot.BACKPRESSURE: policy.BackpressurePolicy,
    Slot.CREDITS: policy.CreditPolicy,
    Slot.ROUTING: policy.RoutingPolicy,
    Slot.BATCHING: policy.BatchingPolicy,
    Slot.HEAD_SAMPLING: policy.HeadSampler,
    Slot.TAIL_SAMPLING: policy.TailSampler,
    Slot.REDACTION: policy.Redactor,
    Slot.OBSERVER: policy.Observer,
}
SINGLE = (Slot.FAIRNESS, Slot.ORDERING, Slot.CREDITS)
# Where a decision can be made and not enforced. An order or a flow of one's own has no meaning unless it is.
SHADOWS = (Slot.ADMISSION, Slot.LIMIT, Slot.BACKPRESSURE, Slot.CREDITS, Slot.ROUTING, Slot.HEAD_SAMPLING)
# Part of the contract, and asked by nobody in this version: refused rather than silently ignored.
NOT_ASKED = (Slot.TAIL_SAMPLING, Slot.REDACTION)


def find_plugins(config: Config) -> pluggy.PluginManager:
    """Raises ConfigError when a plugin cannot be imported or does not keep to the contract."""
    manager = pluggy.PluginManager("nearloop")
    manager.add_hookspecs(hookspec)
    for name in BUILT_IN:
        manager.register(importlib.import_module(f"plugins.{name}"), name)
    problems = []
    for point in sorted(metadata.entry_points(group="nearloop"), key=lambda point: point.name):
        package = point.dist.name if point.dist else "unknown"
        where = f"the entry point {point.name!r} of the package {package!r}"
        problems += _register(manager, point.load, f"{point.name} ({package})", where)
    for name in config.plugins:
        problems += _register(manager, partial(importlib.import_module, name), name, f"plugins: {name!r}")
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        problems.append(f"plugins: {error}")
    if problems:
        raise ConfigError("plugins", problems)
    return manager


def _register(manager: pluggy.PluginManager, load: Callable[[], Any], name: str, where: str) -> list[str]:
    """What is wrong with a plugin, as a sentence. One that is there already, such as an installed one that is also named, is no mistake."""
    try:
        plugin = load()
        if not manager.is_registered(plugin):
            manager.register(plugin, name)
    except Exception as error:
        return [f"{where} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"]
    return []


def brought(manager: pluggy.PluginManager) -> list[tuple[str, PolicyType]]:
    """Every policy type with the name of the plugin that brings it. Raises ConfigError for what is no policy type."""
    found, problems = [], []
    for implementation in manager.hook.nearloop_policy_types.get_hookimpls():
        plugin = implementation.plugin_name
        try:
            types: list[Any] = list(cast(Iterable[Any], implementation.function()))
        except Exception as error:
            problems.append(f"plugin {plugin!r}: nearloop_policy_types() raised {type(error).__name__}: {error}")
            continue
        for policy_type in types:
            wrong = _wrong_type(policy_type)
            problems += [f"plugin {plugin!r}: {wrong}"] if wrong else []
            found.append((plugin, policy_type))
    if problems:
        raise ConfigError("plugins", problems)
    return found


def _wrong_type(policy_type: Any) -> str:
    if not isinstance(policy_type, PolicyType):
        return f"nearloop_policy_types() brought {type(policy_type).__name__}, not a PolicyType"
    if not isinstance(policy_type.name, str) or not subjects.is_id(policy_type.name):
        return f"the policy's name {policy_type.name!r} is not an id: {subjects.ID_RULE}"
    if not isinstance(policy_type.slot, Slot) and policy_type.slot in [slot.value for slot in Slot]:
        return f"policy {policy_type.name!r}: its slot is the text {policy_type.slot!r}; say Slot.{str(policy_type.slot).upper()}"
    if not isinstance(policy_type.on_error, OnError):
        return f"policy {policy_type.name!r}: its on_error is {policy_type.on_error!r}; say OnError.ADMIT or OnError.REJECT"
    if not isinstance(policy_type.slot, Slot):
        hint = nearest(str(policy_type.slot), [slot.value for slot in Slot])
        return f"policy {policy_type.name!r}: there is no slot {policy_type.slot!r}{hint}"
    if not isinstance(policy_type.config, type) or not dataclasses.is_dataclass(policy_type.config):
        return f"policy {policy_type.name!r}: its config must be a dataclass, and is {policy_type.config!r}"
    return ""


def policy_types(manager: pluggy.PluginManager) -> dict[str, PolicyType]:
    """By name. Raises ConfigError for names that are taken twice."""
    found: dict[str, list[tuple[str, PolicyType]]] = {}
    for plugin, policy_type in brought(manager):
        found.setdefault(policy_type.name, []).append((plugin, policy_type))
    problems = [
        f"policy type {name!r} is brought by {' and '.join(repr(plugin) for plugin, _ in several)}: remove or rename one"
        for name, several in sorted(found.items())
        if len(several) > 1
    ]
    if problems:
        raise ConfigError("plugins", problems)
    return {name: policy_type for name, ((_, policy_type),) in found.items()}


def read_parameters(policy_type: PolicyType, parameters: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The policy's configuration, and what is wrong with the parameters, a sentence each."""
    known = [field.name for field in dataclasses.fields(policy_type.config)]
    problems = []
    for unknown in sorted(set(parameters) - set(known)):
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known) or 'no parameters'}"
        problems.append(f"unknown parameter {unknown!r}{hint}")
    problems += [f"{name}: must be a finite number" for name, value in sorted(parameters.items()) if not _is_finite(value)]
    if problems:
        return None, problems
    try:
        return TypeAdapter(policy_type.config).validate_python(dict(parameters)), []
    except ValidationError as error:
        return None, [_where(item) + item["msg"].removeprefix("Value error, ") for item in error.errors()]


def nearest(word: str, known: Collection[str]) -> str:
    """A hint for a word that is not known."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(sorted(known))}" if known else ""


def _is_finite(value: Any) -> bool:
    """False for nan and infinity, also inside lists and tables: every comparison with nan is false, so no policy's own check sees it."""
    if isinstance(value, Mapping):
        return all(_is_finite(one) for one in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)


def _where(item: Any) -> str:
    return ".".join(map(str, item["loc"])) + ": " if item["loc"] else ""


def _trial(policy_type: PolicyType, config: Any) -> list[str]:
    """What is wrong with an object of the type, which is built once to see."""
    try:
        built = policy_type.build(config)
    except Exception as error:
        return [f"cannot be built: {type(error).__name__}: {error}"]
    return method_problems(policy_type.slot, built)


def method_problems(slot: Slot, built: object) -> list[str]:
    """Methods that the slot needs and the policy lacks or takes with other arguments."""
    missing = [name for name in METHODS[slot] if not hasattr(built, name)]
    problems = [f"lacks {', '.join(missing)}, which the slot {slot} needs"] if missing else []
    for name in METHODS[slot]:
        method = getattr(built, name, None)
        wanted = getattr(PROTOCOLS[slot], name, None)
        if not callable(method) or not callable(wanted):
            continue
        if inspect.iscoroutinefunction(method):
            problems.append(f"{name}() is async, and nobody would await it: policies are synchronous")
        names = list(inspect.signature(wanted).parameters)[1:]
        try:
            inspect.signature(method).bind(*names)
        except TypeError:
            problems.append(f"{name}() must take ({', '.join(names)}), and takes {inspect.signature(method)}")
        except ValueError:
            pass  # no signature to look at, as with a builtin
    return problems


def build_policies(config: Config, manager: pluggy.PluginManager) -> PolicySet:
    """Raises ConfigError with every mistake in [[policies]]."""
    types = policy_types(manager)
    by_slot: dict[Slot, list[PolicyEntry]] = {}
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
        slot = policy_type.slot
        if slot in NOT_ASKED:
            problems.append(f"{where}: nothing asks policies of the slot {slot} in this version: take it out")
        if section.shadow and slot not in SHADOWS:
            problems.append(f"{where}: a policy of the slot {slot} cannot be a shadow: that is for {', '.join(SHADOWS)}")
        if name in names:
            problems.append(f"{where}: the name {name!r} is taken: give this instance a name of its own")
        if not subjects.is_id(name):
            problems.append(f"{where}: the name {name!r} is not an id: {subjects.ID_RULE}")
        names.add(name)
        read, wrong = read_parameters(policy_type, section.parameters)
        wrong = wrong or _trial(policy_type, read)
        problems += [f"{where}: {problem}" for problem in wrong]
        on_error = OnError(section.on_error) if section.on_error else policy_type.on_error
        by_slot.setdefault(slot, []).append(PolicyEntry(name, policy_type, read, on_error, section.shadow))
    for slot in SINGLE:
        if len(by_slot.get(slot, ())) > 1:
            problems.append(f"policies: the slot {slot} takes one policy, there are {', '.join(one.name for one in by_slot[slot])}")
    if problems:
        raise ConfigError("policies", problems)
    return PolicySet(by_slot)


def plugin_targets(config: Config, manager: pluggy.PluginManager) -> tuple[Target, ...]:
    return tuple(target for targets in manager.hook.nearloop_targets(config=config) for target in targets)

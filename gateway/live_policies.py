"""Parameters of policies, changed while a process runs: `<policy>.<parameter>` and a value as text, from outside."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from gateway.core.policies import PolicyEntry, PolicySet
from gateway.loader import nearest, read_parameters
from gateway.ports import Verdict


class LivePolicies:
    """A value that is taken away again gives way to that of the configuration. `on_change` is called after each change."""

    def __init__(self, policies: PolicySet, on_change: Callable[[], None] = lambda: None) -> None:
        self._policies = policies
        self._on_change = on_change
        self._own: dict[str, dict[str, Any]] = {}  # by policy: the parameters as the process started
        self._live: dict[str, dict[str, Any]] = {}  # by policy: those that were set since

    def change(self, policy: str, parameter: str, text: str | None) -> Verdict:
        """Sets the parameter to what the text says, JSON or a plain word; None takes a value away. Nothing changes when it is refused."""
        entry = self._policies.find(policy)
        if entry is None:
            return Verdict(False, f"there is no policy {policy!r} here{nearest(policy, self._policies.names)}")
        own = self._own.setdefault(policy, _fields(entry))
        live = dict(self._live.get(policy, {}))
        if text is None:
            if live.pop(parameter, None) is None:
                return Verdict(True, "it was not set")
            return self._apply(entry, own, live, f"{parameter} is {own[parameter]!r} again, as configured")
        if parameter not in own:
            return Verdict(False, f"policy {policy} has no parameter {parameter!r}{nearest(parameter, list(own))}")
        verdict = Verdict(False, "")
        for value in _readings(text):
            verdict = self._apply(entry, own, {**live, parameter: value}, f"{parameter} is {value!r} now")
            if verdict.applied:
                break
        return verdict

    def _apply(self, entry: PolicyEntry, own: dict[str, Any], live: dict[str, Any], done: str) -> Verdict:
        config, problems = read_parameters(entry.type, own | live)
        if problems:
            return Verdict(False, "; ".join(problems))
        try:
            if not hasattr(entry.type.build(config), "reconfigure"):
                return Verdict(False, f"policy {entry.name} cannot be changed while it runs: it has no reconfigure()")
            entry.reconfigure(config)
        except Exception as error:
            return Verdict(False, f"reconfigure() raised {type(error).__name__}: {error}")
        self._live[entry.name] = live
        self._on_change()
        return Verdict(True, done)


def _fields(entry: PolicyEntry) -> dict[str, Any]:
    return {field.name: getattr(entry.config, field.name) for field in dataclasses.fields(entry.config)}


def _readings(text: str) -> list[Any]:
    """What the text may mean: a number, true, a list ... or the word itself."""
    try:
        return [json.loads(text), text]
    except ValueError:
        return [text]

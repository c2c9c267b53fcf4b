"""The plugin contract, whole. pluggy registers and observes; it is never called for a step.

A plugin is a module or object with some of these functions, marked with `gateway.hookimpl`, and found through the entry point group
`nearloop` or the list `plugins` in the configuration. An implementation may take fewer arguments than the specification.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.policy import PolicyType
    from gateway.ports import Executor
    from gateway.types import Kind, Target

hookspec = pluggy.HookspecMarker("nearloop")
hookimpl = pluggy.HookimplMarker("nearloop")

# ---- start-up ------------------------------------------------------------------------------------------------------------------


@hookspec
def nearloop_policy_types() -> "Iterable[PolicyType]":  # type: ignore[empty-body]
    """The policy types that this plugin brings.

    Collected once at start; names must be unique over all plugins. The configuration chooses which are built, in which order and
    with which parameters.

    .. versionadded:: 0.1
    """


@hookspec
def nearloop_targets(config: "Config") -> "Iterable[Target]":  # type: ignore[empty-body]
    """Targets to add to the catalogue, beside those of the configuration.

    Collected once at start of a gateway; (kind, name) must be unique.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def nearloop_executor(kind: "Kind", config: "Config", region: str) -> "Executor | None":
    """The executor for a worker of this kind, or None to leave it to another plugin or the built-in one.

    .. versionadded:: 0.1
    """


# ---- life ----------------------------------------------------------------------------------------------------------------------


@hookspec
def nearloop_started(role: str, name: str) -> None:
    """A gateway or worker serves now. role is `gateway` or `worker`.

    .. versionadded:: 0.1
    """


@hookspec
def nearloop_stopping(role: str, name: str) -> None:
    """It stopped taking work and drains.

    .. versionadded:: 0.1
    """

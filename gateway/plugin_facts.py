"""What there is to say about policies and hooks, read from the code: for `nearloop plugins` and for the guide."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import textwrap
from typing import Any

import pluggy

from gateway import loader
from gateway.errors import ConfigError
from gateway.policy import SCOPED, OnError, PolicyType, Slot


def signature(function: Any) -> str:
    """As in the source: `decide(flow: Flow, ...) -> Decision`, without self and quotation marks."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef)
    node.args.args = [argument for argument in node.args.args if argument.arg != "self"]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}".replace("'", "").replace('"', "")


def methods(slot: Slot) -> list[str]:
    """Signatures of what the kernel calls, and attributes that it reads."""
    protocol = loader.PROTOCOLS[slot]
    found = [
        f"{name}: {kind.__name__ if isinstance(kind, type) else kind}" for name, kind in vars(protocol).get("__annotations__", {}).items()
    ]
    return found + [signature(getattr(protocol, name)) for name in loader.METHODS[slot] if callable(getattr(protocol, name, None))]


def origin(plugin: str) -> str:
    """Of a plugin by its name in the plugin manager."""
    return "built in" if plugin in loader.BUILT_IN else plugin


def objects(policy_type: PolicyType) -> str:
    """How many objects there are of a policy in the configuration."""
    if policy_type.slot is Slot.FAIRNESS:
        return "one for each target and tier"
    if policy_type.slot in SCOPED or policy_type.per_scope:
        return "one for each target"
    return "one for the process"


def on_error(policy_type: PolicyType) -> str:
    if policy_type.slot not in (Slot.CLASSIFY, Slot.ADMISSION, Slot.BACKPRESSURE):
        return "the gateway goes on without it"
    return "the step goes on without it" if policy_type.on_error is OnError.ADMIT else "the step is rejected"


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    type: str
    default: Any  # dataclasses.MISSING where there is none


def parameters(policy_type: PolicyType) -> list[Parameter]:
    found = []
    for field in dataclasses.fields(policy_type.config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        found.append(Parameter(field.name, kind, default))
    return found


def documentation(policy_type: PolicyType) -> str:
    """Of its module when that opens with the question, else of its class."""
    module = inspect.getmodule(policy_type.build)
    text = inspect.getdoc(module) or "" if module else ""
    return text if text.startswith("Question") else inspect.getdoc(policy_type.build) or text


def find_types(word: str, manager: pluggy.PluginManager) -> list[PolicyType]:
    """The type of that name, or those that `module` or `module:Name` brings. Raises ConfigError with a sentence."""
    known = loader.policy_types(manager)
    if word in known:
        return [known[word]]
    module_name, _, name = word.partition(":")
    if not name and "." not in word and not _is_module(word):
        raise ConfigError("plugins", [f"there is no policy {word!r}, and no module of that name{loader.nearest(word, known)}"])
    try:
        module = importlib.import_module(module_name)
        types = list(module.nearloop_policy_types())
    except Exception as error:
        raise ConfigError("plugins", [f"{module_name!r} cannot be loaded: {type(error).__name__}: {error}"]) from None
    chosen = [one for one in types if not name or name in (one.name, getattr(one.build, "__name__", ""))]
    if not chosen:
        raise ConfigError("plugins", [f"{module_name!r} brings no policy {name!r}{loader.nearest(name, [one.name for one in types])}"])
    return chosen


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False

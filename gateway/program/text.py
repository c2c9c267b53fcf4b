"""YAML and JSON texts to plain values, without what makes them ambiguous or expensive.

YAML is read by the core schema of version 1.2: `yes`, `on`, `010` and dates are what they look like, not booleans, octal numbers or days.
Refused in both: a key twice in one mapping, keys that are no strings, values nested more than 64 deep, texts above 1 MiB; in YAML
also tags, and aliases, which can stand for exponentially large values.
"""

import json
import re
from collections.abc import Hashable
from typing import Any, NoReturn

import yaml

from gateway.program.problems import ProgramInvalid

MOST_BYTES = 1024 * 1024
MOST_DEPTH = 64
SUFFIXES = (".yaml", ".yml", ".json")


def read(text: str, name: str) -> object:
    """The value of a text whose format the name's suffix says. Raises ProgramInvalid."""
    if len(text) > MOST_BYTES or len(text.encode(errors="replace")) > MOST_BYTES:
        raise _invalid(f"is larger than {MOST_BYTES} bytes")
    suffix = name[name.rfind(".") :].lower() if "." in name else ""
    if suffix not in SUFFIXES:
        raise _invalid(f"has a name that ends in none of {', '.join(SUFFIXES)}")
    try:
        value = _read_json(text) if suffix == ".json" else _read_yaml(text)
    except RecursionError:
        raise _invalid(f"nests more than {MOST_DEPTH} deep") from None
    except ValueError as error:
        raise _invalid(str(error)) from None
    if depth(value) > MOST_DEPTH:
        raise _invalid(f"nests more than {MOST_DEPTH} deep")
    return value


def depth(value: object) -> int:
    """How many lists and mappings are inside one another, MOST_DEPTH + 1 for more than that."""
    level, deep = [value], 0
    while deep <= MOST_DEPTH and (level := [item for item in level if isinstance(item, dict | list)]):
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        deep += 1
    return deep


def _invalid(text: str) -> ProgramInvalid:
    return ProgramInvalid([("", text)])


def _read_json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg}, at line {error.lineno}, column {error.colno}") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"has the key `{next(key for key in keys if keys.count(key) > 1)}` twice in one object")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"is not JSON: {name} is not allowed")


def _whole(text: str) -> int:
    if len(text) > 400:
        raise ValueError(f"has a number of {len(text)} digits")
    return int(text)


def _read_yaml(text: str) -> object:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"is not YAML: {error.problem}{place}") from None
    except yaml.YAMLError:
        raise ValueError("is not YAML: it has a character that YAML does not allow") from None


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - of yaml; the safe loader's are those of YAML 1.1
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "tags are not supported", event.start_mark)
        self._depth += 1
        if self._depth > MOST_DEPTH * 2:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is not a string: put it in quotes", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key.value}` is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = node.value.lower()
        if text.lstrip("+-").startswith((".inf", ".nan")):
            raise yaml.constructor.ConstructorError(None, None, "a number is not finite", node.start_mark)
        if node.tag.endswith("float"):
            return float(text)
        return int(text, 0) if text.startswith(("0x", "0o")) else _whole(text)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)

"""What of a template can never fit a target's input schema, whatever its expressions give.

Looks at `type`, `required`, `properties`, `additionalProperties: false`, `items`, `enum` and `const` where they are written out; the
gateway checks each step's input against the whole schema when it is executed. So what is reported here is wrong for sure.
"""

from collections.abc import Iterator, Mapping

from gateway.program.expressions import Compiled, split
from gateway.program.model import Json
from gateway.program.problems import nearest
from gateway.program.reader import join

_TYPES: Mapping[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int, float),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}
_ANY = object()  # what an expression gives
_TEXT = object()  # a string with expressions inside


def misfits(schema: object, value: Json, path: str) -> Iterator[tuple[str, str]]:
    """(path, sentence) for each part of the template that cannot fit."""
    if not isinstance(schema, Mapping):
        return
    known = _known(value)
    if known is _ANY:
        return
    types = schema.get("type")
    types = [types] if isinstance(types, str) else types
    if isinstance(types, list) and not any(_is(known, name) for name in types):
        yield path, f"must be {' or '.join(map(str, types))}"
        return
    if isinstance(known, dict):
        yield from _object(schema, known, path)
    elif isinstance(known, list):
        for index, item in enumerate(known):
            yield from misfits(schema.get("items"), item, f"{path}[{index}]")
    elif known is not _TEXT:
        allowed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(allowed, list) and not any(type(known) is type(one) and known == one for one in allowed):
            yield path, f"must be one of {', '.join(map(repr, allowed[:8]))}"


def _object(schema: Mapping[str, object], value: dict[str, Json], path: str) -> Iterator[tuple[str, str]]:
    required, properties = schema.get("required"), schema.get("properties")
    for name in required if isinstance(required, list) else []:
        if name not in value:
            yield path, f"must have `{name}`"
    if not isinstance(properties, Mapping):
        return
    for name, item in value.items():
        if name in properties:
            yield from misfits(properties[name], item, join(path, name))
        elif schema.get("additionalProperties") is False and "patternProperties" not in schema:
            yield join(path, name), f"must not have `{name}`{nearest(name, properties)}"


def _known(value: Json) -> object:
    if not isinstance(value, str):
        return value
    try:
        parts = split(value)
    except ValueError:  # reported where expressions are checked
        return _ANY
    if not any(isinstance(part, Compiled) for part in parts):
        return parts[0]
    return _ANY if len(parts) == 1 else _TEXT


def _is(value: object, name: object) -> bool:
    if value is _TEXT:
        return name == "string"
    if name not in _TYPES or (isinstance(value, bool) and name != "boolean"):
        return name not in _TYPES
    if name == "integer" and isinstance(value, float) and not value.is_integer():
        return False
    return isinstance(value, _TYPES[str(name)])

"""Reads fields of plain values and collects everything that is wrong with them."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from gateway.program.model import Expression, Json, Template
from gateway.program.problems import nearest

RESERVED = frozenset(
    "true false null in as break const continue else for function if import let loop package namespace return var void while".split()
)
NAMES_OF_OURS = frozenset({"input", "steps", "loop"})
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

T = TypeVar("T")


class Reader:
    """Each method gives a value that can be worked on with, also when it has noted a problem. problems: (path, sentence)."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []

    def say(self, path: str, text: str) -> None:
        self.problems.append((path, text))

    def table(self, value: object, path: str, known: Iterable[str] | None = None) -> Mapping[str, object]:
        """A mapping with string keys; with `known`, no others than those."""
        if not isinstance(value, Mapping):
            self.say(path, f"must be a mapping, not {_kind(value)}")
            return {}
        made = {key: item for key, item in value.items() if isinstance(key, str)}
        if len(made) != len(value):
            self.say(path, "has a key that is not a string")
        if known is not None:
            known = list(known)
            for key in made:
                if key not in known:
                    self.say(join(path, key), f"there is no `{key}` here{nearest(key, known) or ': known are ' + ', '.join(known)}")
        return made

    def items(self, value: object, path: str) -> list[object]:
        if not isinstance(value, list | tuple):
            self.say(path, f"must be a list, not {_kind(value)}")
            return []
        return list(value)

    def text(self, value: object, path: str, most: int = 4096) -> str:
        if not isinstance(value, str):
            self.say(path, f"must be a text, not {_kind(value)}")
            return ""
        if len(value) > most:
            self.say(path, f"has {len(value)} characters: at most {most} are allowed")
        return value

    def name(self, value: object, path: str) -> str:
        """Of a target, a program or a region."""
        text = self.text(value, path)
        if isinstance(value, str) and not _NAME.fullmatch(text):
            self.say(path, "must be 1 to 128 letters, digits and any of `_.:/-`")
        return text

    def identifier(self, value: object, path: str, taken: frozenset[str] = frozenset()) -> str:
        text = self.text(value, path)
        if not isinstance(value, str):
            return text
        if not _IDENTIFIER.fullmatch(text):
            self.say(path, "must be 1 to 64 letters, digits and `_`, without a digit first, so that expressions can use it")
        elif text in RESERVED or text in taken:
            self.say(path, f"`{text}` is a word of the language: take another name")
        return text

    def whole(self, value: object, path: str, least: int, most: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON by way of protobuf knows no integers
        if not isinstance(value, int) or isinstance(value, bool):
            self.say(path, f"must be a whole number, not {_kind(value)}")
            return least
        if not least <= value <= most:
            self.say(path, f"must be from {least} to {most}")
        return value

    def number(self, value: object, path: str, least: float, most: float) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.say(path, f"must be a number, not {_kind(value)}")
            return least
        if not least <= value <= most:
            self.say(path, f"must be from {least:g} to {most:g}")
            return least
        return float(value)

    def flag(self, value: object, path: str) -> bool:
        if not isinstance(value, bool):
            self.say(path, f"must be true or false, not {_kind(value)}")
        return value is True

    def choice(self, value: object, path: str, names: Mapping[str, T], otherwise: T) -> T:
        text = self.text(value, path)
        if text in names:
            return names[text]
        if isinstance(value, str):
            self.say(path, f"there is no `{text}`{nearest(text, names) or ': take one of ' + ', '.join(names)}")
        return otherwise

    def expression(self, value: object, path: str) -> Expression:
        """CEL, bare or as `${...}` as a whole; `true`, `false` and numbers may stand without quotes."""
        if isinstance(value, bool):
            value = "true" if value else "false"
        text = self.text(value, path).strip()
        return Expression(text[2:-1].strip() if text.startswith("${") and text.endswith("}") else text)

    def template(self, value: object, path: str) -> Template:
        return Template(self.json(value, path))

    def json(self, value: object, path: str) -> Json:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                self.say(path, "is not finite, so it is not JSON")
            return value
        if isinstance(value, list | tuple):
            return [self.json(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, Mapping):
            return {key: self.json(item, join(path, key)) for key, item in self.table(value, path).items()}
        self.say(path, f"is {_kind(value)}, which is not JSON")
        return None


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    kinds = {type(None): "nothing", str: "a text", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), f"a {type(value).__name__}")

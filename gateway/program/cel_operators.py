"""What CEL's operators and functions do with JSON values, as its specification says, each with the work that it costs.

Numbers of both types compare by value; arithmetic wants both sides of one type (`double(n) * 0.5`). Integers have 64 bits.
"""

import math
from collections.abc import Callable
from typing import Any

import re2  # type: ignore[import-untyped]

CHARS_PER_UNIT = 256  # of work
MOST_CHARS = 4_000_000  # of a string that is made
MOST_PATTERN_CHARS = 256

_QUIET = re2.Options()
_QUIET.log_errors = False
_QUIET.max_mem = 1 << 20


class Wrong(Exception):
    """An operation cannot be done. Its text quotes no values."""


def kind(value: object) -> str:
    """CEL's name for the type of a JSON value."""
    if value is None:
        return "null"
    for python_type, name in ((bool, "bool"), (int, "int"), (float, "double"), (str, "string"), (list, "list"), (dict, "map")):
        if isinstance(value, python_type):
            return name
    return "no JSON value"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Operators:
    """spend(units) is called for the work of each operation, before the work is done; it may raise."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend

    def table(self) -> dict[str, Callable[..., Any]]:
        """By the names that CEL's specification gives the operators. Each raises Wrong."""
        return {
            "_==_": self.equal,
            "_!=_": lambda a, b: not self.equal(a, b),
            "_<_": lambda a, b: self._ordered(a, b, "<") and a < b,
            "_<=_": lambda a, b: self._ordered(a, b, "<=") and a <= b,
            "_>_": lambda a, b: self._ordered(a, b, ">") and a > b,
            "_>=_": lambda a, b: self._ordered(a, b, ">=") and a >= b,
            "_in_": self.is_in,
            "_[_]": _index,
            "_+_": self.add,
            "_-_": lambda a, b: _arithmetic(a, b, "-"),
            "_*_": lambda a, b: _arithmetic(a, b, "*"),
            "_/_": lambda a, b: _arithmetic(a, b, "/"),
            "_%_": lambda a, b: _arithmetic(a, b, "%"),
            "-_": _negative,
            "!_": _not,
            "_?_:_": lambda condition, a, b: a if _bool(condition, "a ? b : c") else b,
            "size": _size,
            "contains": lambda text, part: self._texts(text, part, "contains") and part in text,
            "startsWith": lambda text, part: self._texts(text, part, "startsWith") and text.startswith(part),
            "endsWith": lambda text, part: self._texts(text, part, "endsWith") and text.endswith(part),
            "matches": self.matches,
            "int": self.to_int,
            "double": self.to_double,
            "string": self.to_string,
            "bool": _to_bool,
        }

    def equal(self, a: Any, b: Any) -> bool:
        self._spend(1)
        if is_number(a) and is_number(b):
            return bool(a == b)
        if kind(a) != kind(b):
            return False
        if isinstance(a, list):
            return len(a) == len(b) and all(self.equal(one, other) for one, other in zip(a, b, strict=True))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self.equal(value, b[key]) for key, value in a.items())
        if isinstance(a, str):
            self._spend(min(len(a), len(b)) // CHARS_PER_UNIT)
        return bool(a == b)

    def is_in(self, item: Any, container: Any) -> bool:
        if isinstance(container, dict):
            return isinstance(item, str) and item in container
        if isinstance(container, list):
            return any(self.equal(item, other) for other in container)
        raise Wrong(f"in: {kind(container)} is neither list nor map")

    def add(self, a: Any, b: Any) -> Any:
        if isinstance(a, str) and isinstance(b, str):
            if len(a) + len(b) > MOST_CHARS:
                raise Wrong(f"+: the string would have more than {MOST_CHARS} characters")
            self._spend((len(a) + len(b)) // CHARS_PER_UNIT)
            return a + b
        if isinstance(a, list) and isinstance(b, list):
            self._spend(len(a) + len(b))
            return a + b
        return _arithmetic(a, b, "+")

    def matches(self, text: Any, pattern: Any) -> bool:
        """In linear time: RE2."""
        self._texts(text, pattern, "matches")
        if len(pattern) > MOST_PATTERN_CHARS:
            raise Wrong(f"matches: the pattern has more than {MOST_PATTERN_CHARS} characters")
        self._spend(50 + len(text) // 64)
        try:
            return re2.compile(pattern, _QUIET).search(text) is not None
        except (re2.error, UnicodeEncodeError):
            raise Wrong("matches: the pattern is no regular expression of RE2") from None

    def to_int(self, value: Any) -> int:
        try:
            if isinstance(value, str):
                if len(value) > 20:
                    raise ValueError
                return _int64(int(value), "int(...)")
            if is_number(value):
                return _int64(math.trunc(value), "int(...)")
        except (ValueError, OverflowError):
            raise Wrong("int(...): the value is no integer of 64 bits") from None
        raise Wrong(f"int(...): {kind(value)} cannot be converted")

    def to_double(self, value: Any) -> float:
        try:
            if is_number(value) or (isinstance(value, str) and len(value) <= 400):
                return float(value)
        except (ValueError, OverflowError):
            raise Wrong("double(...): the value is no number") from None
        raise Wrong(f"double(...): {kind(value)} cannot be converted")

    def to_string(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        if is_number(value):
            try:
                return str(value)
            except ValueError:  # an integer of thousands of digits
                raise Wrong("string(...): the number is too large") from None
        raise Wrong(f"string(...): {kind(value)} cannot be converted")

    def _ordered(self, a: Any, b: Any, sign: str) -> bool:
        if isinstance(a, str) and isinstance(b, str):
            self._spend(min(len(a), len(b)) // CHARS_PER_UNIT)
        elif not (is_number(a) and is_number(b)) and not (isinstance(a, bool) and isinstance(b, bool)):
            raise Wrong(f"{sign}: {kind(a)} and {kind(b)} have no order")
        return True

    def _texts(self, text: Any, part: Any, name: str) -> bool:
        if not isinstance(text, str) or not isinstance(part, str):
            raise Wrong(f"{name}: {kind(text)} and {kind(part)} are not both strings")
        self._spend((len(text) + len(part)) // CHARS_PER_UNIT)
        return True


def both(a: Any, b: Any, decisive: bool, is_error: Callable[[Any], bool], sign: str) -> Any:
    """`a || b` (decisive: True) and `a && b` (decisive: False): a side that decides makes an error on the other side irrelevant."""
    for side in (a, b):
        if side is decisive:
            return decisive
    for side in (a, b):
        if is_error(side):
            return side
    for side in (a, b):
        _bool(side, sign)
    return not decisive


def _bool(value: Any, sign: str) -> bool:
    if not isinstance(value, bool):
        raise Wrong(f"{sign}: {kind(value)} is not bool")
    return value


def _not(value: Any) -> bool:
    return not _bool(value, "!")


def _size(value: Any) -> int:
    if not isinstance(value, str | list | dict):
        raise Wrong(f"size: {kind(value)} has no size")
    return len(value)


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return bool(value == "true")
    raise Wrong("bool(...): the value is neither true nor false")


def _index(container: Any, index: Any) -> Any:
    if isinstance(container, dict):
        if isinstance(index, str):
            if index in container:
                return container[index]
            raise Wrong("[...]: the map has no such key")
        raise Wrong(f"[...]: a key of a map is a string, not {kind(index)}")
    if not isinstance(container, list):
        raise Wrong(f"[...]: {kind(container)} is neither list nor map")
    if isinstance(index, float) and index.is_integer():
        index = int(index)
    if kind(index) != "int":
        raise Wrong(f"[...]: an index of a list is an int, not {kind(index)}")
    if not 0 <= index < len(container):
        raise Wrong(f"[...]: the list has {len(container)} items, the index is outside of it")
    return container[index]


def _negative(value: Any) -> Any:
    if not is_number(value):
        raise Wrong(f"-: {kind(value)} is no number")
    return -value if isinstance(value, float) else _int64(-value, "-")


def _arithmetic(a: Any, b: Any, sign: str) -> Any:
    if not (is_number(a) and is_number(b)) or type(a) is not type(b) or (sign == "%" and isinstance(a, float)):
        raise Wrong(f"{sign}: {kind(a)} and {kind(b)} do not go together" + (_HINT if is_number(a) and is_number(b) else ""))
    if sign in "/%" and b == 0:
        raise Wrong(f"{sign}: division by zero")
    if sign == "+":
        made = a + b
    elif sign == "-":
        made = a - b
    elif sign == "*":
        made = a * b
    elif isinstance(a, float):
        made = a / b
    else:  # toward zero, and what is left of that
        made = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        made = made if sign == "/" else a - b * made
    return made if isinstance(made, float) else _int64(made, sign)


_HINT = ": convert one with int(...) or double(...)"


def _int64(value: int, sign: str) -> int:
    if not -(2**63) <= value < 2**63:
        raise Wrong(f"{sign}: beyond 64 bits")
    return value

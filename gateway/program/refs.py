"""Expressions as Python writes them: what `p.input.question` or `hits.size() > 0` is while a program is being built.

A Ref stands for a value that only a run has. Operators and methods give other Refs, and each renders to CEL. What Python would have to
know the value for, such as `if ref:` or `for item in ref:`, raises TypeError and says what to write instead.

A field whose name is also a method of Ref (`size`, `map`, ...) is written with an index: `hit["size"]`.
"""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from gateway.program.reader import NAMES_OF_OURS, RESERVED

# How tightly an expression binds, by CEL's grammar.
CHOICE, OR, AND, RELATION, SUM, PRODUCT, UNARY, MEMBER = range(8)

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Ref:
    """An expression. In an f-string it becomes `${...}`, so `f"Page: {page.text}"` is a template with its text."""

    __slots__ = ("_binds", "_cel", "_roots")
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __init__(self, cel: str, binds: int = MEMBER, roots: frozenset[str] = frozenset()) -> None:
        """roots: names of the variables it uses."""
        self._cel, self._binds, self._roots = cel, binds, roots

    # --- parts of it ---

    def __getattr__(self, name: str) -> "Ref":
        if name.startswith("__"):
            raise AttributeError(name)  # of Python's own protocols, not a field
        return self[name]

    def __getitem__(self, key: "int | str | Ref") -> "Ref":
        if isinstance(key, str) and is_plain_field(key):
            return Ref(f"{_in(self, MEMBER)}.{key}", MEMBER, self._roots)
        if isinstance(key, slice):
            raise TypeError("CEL has no slices: take items with filter(), or have a tool do it")
        index = to_ref(key)
        return Ref(f"{_in(self, MEMBER)}[{index._cel}]", MEMBER, self._roots | index._roots)

    def has(self, field: str) -> "Ref":
        """Whether an object has the field."""
        return _call("has", self[field]) if is_plain_field(field) else literal(field).is_in(self)

    # --- comparisons and arithmetic: both sides of arithmetic are of one type, as_double() and as_int() convert ---

    def __eq__(self, other: object) -> "Ref":  # type: ignore[override]
        return _infix(self, "==", other, RELATION)

    def __ne__(self, other: object) -> "Ref":  # type: ignore[override]
        return _infix(self, "!=", other, RELATION)

    def __lt__(self, other: object) -> "Ref":
        return _infix(self, "<", other, RELATION)

    def __le__(self, other: object) -> "Ref":
        return _infix(self, "<=", other, RELATION)

    def __gt__(self, other: object) -> "Ref":
        return _infix(self, ">", other, RELATION)

    def __ge__(self, other: object) -> "Ref":
        return _infix(self, ">=", other, RELATION)

    def __add__(self, other: object) -> "Ref":
        return _infix(self, "+", other, SUM)

    def __radd__(self, other: object) -> "Ref":
        return _infix(other, "+", self, SUM)

    def __sub__(self, other: object) -> "Ref":
        return _infix(self, "-", other, SUM)

    def __rsub__(self, other: object) -> "Ref":
        return _infix(other, "-", self, SUM)

    def __mul__(self, other: object) -> "Ref":
        return _infix(self, "*", other, PRODUCT)

    def __rmul__(self, other: object) -> "Ref":
        return _infix(other, "*", self, PRODUCT)

    def __truediv__(self, other: object) -> "Ref":
        """Of two integers: toward zero, as CEL does."""
        return _infix(self, "/", other, PRODUCT)

    def __rtruediv__(self, other: object) -> "Ref":
        return _infix(other, "/", self, PRODUCT)

    def __mod__(self, other: object) -> "Ref":
        return _infix(self, "%", other, PRODUCT)

    def __rmod__(self, other: object) -> "Ref":
        return _infix(other, "%", self, PRODUCT)

    def __neg__(self) -> "Ref":
        return Ref(f"-{_in(self, MEMBER)}", UNARY, self._roots)

    # --- conditions: `&`, `|` and `~`; each comparison in parentheses ---

    def __and__(self, other: "Ref | bool") -> "Ref":
        return _infix(self, "&&", _condition(other), AND)

    def __rand__(self, other: bool) -> "Ref":
        return _infix(_condition(other), "&&", self, AND)

    def __or__(self, other: "Ref | bool") -> "Ref":
        return _infix(self, "||", _condition(other), OR)

    def __ror__(self, other: bool) -> "Ref":
        return _infix(_condition(other), "||", self, OR)

    def __invert__(self) -> "Ref":
        return Ref(f"!{_in(self, MEMBER)}", UNARY, self._roots)

    def is_in(self, container: object) -> "Ref":
        """Whether a list has it as an item, or an object as a key."""
        return _infix(self, "in", container, RELATION)

    # --- functions ---

    def size(self) -> "Ref":
        """Of a list, an object or a text."""
        return _method(self, "size")

    def contains(self, text: object) -> "Ref":
        return _method(self, "contains", text)

    def starts_with(self, text: object) -> "Ref":
        return _method(self, "startsWith", text)

    def ends_with(self, text: object) -> "Ref":
        return _method(self, "endsWith", text)

    def matches(self, pattern: object) -> "Ref":
        """Whether a regular expression (RE2) is found in it."""
        return _method(self, "matches", pattern)

    def as_int(self) -> "Ref":
        return _call("int", self)

    def as_double(self) -> "Ref":
        return _call("double", self)

    def as_text(self) -> "Ref":
        return _call("string", self)

    def as_bool(self) -> "Ref":
        return _call("bool", self)

    # --- of lists and the keys of objects; two of them inside one another at most ---

    def map(self, of: Callable[["Ref"], object]) -> "Ref":
        """`hits.map(lambda hit: hit.id)`"""
        return _macro(self, "map", of)

    def filter(self, condition: Callable[["Ref"], object]) -> "Ref":
        return _macro(self, "filter", condition)

    def all(self, condition: Callable[["Ref"], object]) -> "Ref":
        return _macro(self, "all", condition)

    def exists(self, condition: Callable[["Ref"], object]) -> "Ref":
        return _macro(self, "exists", condition)

    def exists_one(self, condition: Callable[["Ref"], object]) -> "Ref":
        return _macro(self, "exists_one", condition)

    # --- what Python asks of a value ---

    def __str__(self) -> str:
        return f"${{{self._cel}}}"

    def __format__(self, spec: str) -> str:
        if spec:
            raise TypeError(f"`{{...:{spec}}}` needs the value, which only a run has")
        return str(self)

    def __repr__(self) -> str:
        return f"Ref({self._cel})"

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"only a run knows whether `{self._cel}` is true: write `with p.when(...)` for `if`, "
            "`if_else(...)` for a value, and `&`, `|`, `~` for `and`, `or`, `not` and for `a < b < c`"
        )

    def __iter__(self) -> NoReturn:
        raise TypeError(f"only a run knows the items of `{self._cel}`: write `with p.map(...)`, or `.map(lambda item: ...)`")

    def __len__(self) -> NoReturn:
        raise TypeError(f"only a run knows the length of `{self._cel}`: write `.size()`")

    def __contains__(self, item: object) -> NoReturn:
        raise TypeError(f"only a run knows what is in `{self._cel}`: write `literal(item).is_in(...)`, or `.contains(...)` of a text")


def literal(value: object) -> Ref:
    """A constant as an expression. `literal("${")` is that text as it stands, which in a string would begin an expression."""
    return to_ref(value)


null = Ref("null")  # `value == null`: linters would have `value is None` for `value == None`


def if_else(condition: "Ref | bool", then: object, otherwise: object) -> Ref:
    """The one value or the other."""
    asked, yes, no = to_ref(_condition(condition)), to_ref(then), to_ref(otherwise)
    roots = asked._roots | yes._roots | no._roots
    return Ref(f"{_in(asked, OR)} ? {_in(yes, OR)} : {_in(no, OR)}", CHOICE, roots)


def to_ref(value: object) -> Ref:
    """A JSON value that may hold Refs, as an expression. Raises TypeError or ValueError for what CEL has not."""
    if isinstance(value, Ref):
        return value
    if value is None or isinstance(value, bool):
        return Ref({None: "null", True: "true", False: "false"}[value])
    if isinstance(value, str):
        return Ref(_quoted(value))
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise ValueError("a number is not finite, so it is not JSON")
        return Ref(repr(value), UNARY if value < 0 or repr(value).startswith("-") else MEMBER)
    if isinstance(value, list | tuple):
        items = [to_ref(item) for item in value]
        return Ref(f"[{', '.join(item._cel for item in items)}]", MEMBER, _all_roots(items))
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a key of an object is no text")
        values = {_quoted(key): to_ref(item) for key, item in value.items()}
        return Ref(f"{{{', '.join(f'{key}: {item._cel}' for key, item in values.items())}}}", MEMBER, _all_roots(values.values()))
    raise TypeError(f"a {type(value).__name__} is no JSON value")


def cel(value: object) -> str:
    """The source of the expression."""
    return to_ref(value)._cel


def roots(value: Ref) -> frozenset[str]:
    return value._roots


def is_plain_field(name: str) -> bool:
    """Whether it can stand after a dot."""
    return bool(_FIELD.fullmatch(name)) and name not in RESERVED


def _all_roots(refs: Any) -> frozenset[str]:
    return frozenset().union(*(ref._roots for ref in refs))


def _quoted(text: str) -> str:
    """A string of CEL; what cannot be printed is escaped."""
    return "'" + "".join(_ESCAPES.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + "'"


def _in(ref: Ref, binds: int) -> str:
    """Its source, in parentheses where what is around it binds more tightly."""
    return ref._cel if ref._binds >= binds else f"({ref._cel})"


def _infix(left: object, sign: str, right: object, binds: int) -> Ref:
    one, other = to_ref(left), to_ref(right)
    left_binds = RELATION + 1 if binds == RELATION else binds  # `a < b < c` is no idiom of CEL
    return Ref(f"{_in(one, left_binds)} {sign} {_in(other, binds + 1)}", binds, one._roots | other._roots)


def _condition(value: object) -> "Ref | bool":
    if not isinstance(value, Ref | bool):
        raise TypeError(f"`&` and `|` join conditions, not {value!r}: put each comparison in parentheses, `(a > 0) & (b > 0)`")
    return value


def _method(ref: Ref, name: str, *arguments: object) -> Ref:
    given = [to_ref(argument) for argument in arguments]
    return Ref(f"{_in(ref, MEMBER)}.{name}({', '.join(one._cel for one in given)})", MEMBER, ref._roots | _all_roots(given))


def _call(name: str, ref: Ref) -> Ref:
    return Ref(f"{name}({ref._cel})", MEMBER, ref._roots)


def _macro(ref: Ref, name: str, of: Callable[[Ref], object]) -> Ref:
    """The item is called as in the lambda, or else by a name that hides nothing which the lambda uses."""
    item = next(iter(inspect.signature(of).parameters), "item")
    unlike_any = "\0"
    used = to_ref(of(Ref(unlike_any, MEMBER, frozenset({unlike_any}))))._roots
    while item in RESERVED | NAMES_OF_OURS | used or not item.isascii():
        item = f"{item if item.isascii() else 'item'}_"
    body = to_ref(of(Ref(item, MEMBER, frozenset({item}))))
    return Ref(f"{_in(ref, MEMBER)}.{name}({item}, {body._cel})", MEMBER, ref._roots | (body._roots - {item}))

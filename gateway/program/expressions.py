"""Expressions and templates of programs: CEL over JSON values, compiled once, with a bound on what one evaluation may cost.

The library is cel-python (celpy, pure Python), not common-expression-language (cel, Rust). Measured on a 1 MB variable for
`steps.search.output.hits[0].id`: cel 5 ms an evaluation, since it copies all variables in, and 35 to 50 us for each item of a macro;
celpy with its operators put over plain JSON values (`cel_operators`) about 50 us and 35 us, whatever the size of the variables. cel
gives no tree, so neither references nor depth, cannot be stopped in the middle of an evaluation, refuses `loop.index` (CEL reserves
`loop`) and counts bytes in size("é"). Import: about 0.3 s for either.

What bounds an expression: 4096 characters of source, 24 brackets and 64 operations inside one another, two macros inside one another
(cel_syntax); 50,000 units of work an evaluation, counted while it runs (cel_evaluator), which is a quarter to half of a second on a slow
core whatever the program and its values are; regular expressions in linear time (RE2); a result of at most 4 MB of JSON. What bounds all
expressions of a run together is an `Allowance` of the same units; looking through results and writing them as text counts there, too.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from celpy.evaluation import CELEvalError

from gateway.program.allowance import Allowance
from gateway.program.cel_evaluator import MOST_WORK, WorkExceeded, run
from gateway.program.cel_operators import CHARS_PER_UNIT, kind
from gateway.program.cel_syntax import Node, code, parse, references
from gateway.program.model import Json

MOST_RESULT_CHARS = 4_000_000  # of JSON, about
MOST_RESULT_DEPTH = 100
VALUES_PER_UNIT = 8  # to look through a result, or to copy a template
MOST_SHOWN_CHARS = 120  # of an expression in a message
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d{1,9}\])*", re.ASCII)
_PART = re.compile(r"\w+", re.ASCII)
_NOT_THERE = object()
_ENOUGH = 2 * MOST_WORK + MOST_RESULT_CHARS  # for any one evaluation


class ExpressionFailed(ValueError):
    """An expression has no value for these variables. The text names the expression and quotes no values."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """references: dotted paths of the variables that it uses, `steps.search.output.hits`; roots: their first names. path: for an
    expression that is nothing but a path, as most are: what the evaluator would follow in 50 us is followed in 2."""

    text: str
    tree: Node
    references: frozenset[str]
    roots: frozenset[str]
    path: tuple[str | int, ...] = ()


@dataclass(frozen=True, slots=True)
class CompiledTemplate:
    """value: the template with a Compiled in place of a whole-string expression, and Parts in place of a string with some inside.
    units: of work, for what is copied of it whatever its expressions give."""

    value: object
    expressions: tuple[Compiled, ...]
    units: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    parts: tuple[str | Compiled, ...]


def compile_expression(text: str) -> Compiled:
    """Raises ValueError with a sentence that names the expression and, where there is one, the position."""
    try:
        tree = parse(text)
    except ValueError as error:
        raise ValueError(f"`{_shown(text)}` {error}") from None
    used = references(tree)
    roots = frozenset(path.split(".")[0] for path in used)
    path = tuple(int(part) if part.isdigit() else part for part in _PART.findall(text)) if roots and _PATH.fullmatch(text) else ()
    return Compiled(text, tree, used, roots, path)


def references_of(compiled: Compiled | CompiledTemplate) -> frozenset[str]:
    """Dotted paths of all variables that an expression, or any expression of a template, uses."""
    if isinstance(compiled, Compiled):
        return compiled.references
    return frozenset().union(*(expression.references for expression in compiled.expressions))


def evaluate(compiled: Compiled, variables: Mapping[str, Json], allowance: Allowance | None = None) -> Json:
    """The value, which may share parts with the variables. Raises ExpressionFailed, and UsedUp where there is an allowance."""
    allowance = allowance or Allowance(_ENOUGH)
    missing = sorted(compiled.roots - variables.keys())
    if missing:
        raise _failed(compiled, f"there is no variable `{missing[0]}` here")
    try:
        value = _follow(compiled.path, variables)
        if value is _NOT_THERE:
            value = run(compiled.tree, {name: variables[name] for name in compiled.roots}, allowance)
        else:
            allowance.spend(len(compiled.path))
        if not any(value is variables[name] for name in compiled.roots):
            _measure(value, allowance)
    except CELEvalError as error:
        raise _failed(compiled, str(error.args[0])) from None
    except WorkExceeded:
        raise _failed(compiled, f"it takes more than {MOST_WORK} units of work: use smaller lists or fewer macros") from None
    except RecursionError:
        raise _failed(compiled, "its values nest too deep") from None
    except _TooLarge as error:
        raise _failed(compiled, f"its result {error}") from None
    return cast(Json, value)


def _follow(path: tuple[str | int, ...], variables: Mapping[str, Json]) -> object:
    """What is at the path; _NOT_THERE for no path, and for all that the evaluator has something to say about."""
    if not path:
        return _NOT_THERE
    value: Any = variables
    for part in path:
        there = (
            part in value if isinstance(part, str) and isinstance(value, Mapping) else isinstance(value, list) and _is_index(part, value)
        )
        if not there:
            return _NOT_THERE
        value = value[part]
    return value


def _is_index(part: str | int, items: list[Any]) -> bool:
    return isinstance(part, int) and part < len(items)


def compile_template(value: Json) -> CompiledTemplate:
    """Raises ValueError for the first expression that does not compile; `template_strings` finds the strings for all of them."""
    found: list[Compiled] = []
    return CompiledTemplate(_compile(value, found), tuple(found), _count(value) // VALUES_PER_UNIT)


def render(compiled: CompiledTemplate, variables: Mapping[str, Json], allowance: Allowance | None = None) -> Json:
    """The value with its expressions filled in. Raises ExpressionFailed, and UsedUp where there is an allowance."""
    if allowance is not None:
        allowance.spend(compiled.units)
    return _render(compiled.value, variables, allowance)


def split(text: str) -> list[str | Compiled]:
    """A string of a template as plain texts and compiled expressions. Raises ValueError."""
    parts: list[str | Compiled] = []
    plain, at = "", 0
    while (start := text.find("${", at)) >= 0:
        if start > at and text[start - 1] == "$":  # `$${` is a literal `${`
            plain, at = plain + text[at : start - 1] + "${", start + 2
            continue
        end = _end(text, start + 2)
        parts += [plain + text[at:start]] if plain or start > at else []
        parts.append(compile_expression(text[start + 2 : end].strip()))
        plain, at = "", end + 1
    plain += text[at:]
    return [*parts, plain] if plain or not parts else parts


def _end(text: str, start: int) -> int:
    """Where the expression that begins at `start` ends: the brace that it did not open, outside of its strings."""
    depth = 0
    try:
        for position, character in code(text, start):
            if character == "}" and depth == 0:
                return position
            depth += (character == "{") - (character == "}")
    except ValueError as error:
        raise ValueError(f"`{_shown(text)}` {error}") from None
    raise ValueError(f"`{_shown(text)}` has `${{` at character {start - 1} without its `}}`: write `$${{` for the text `${{`")


def _compile(value: Json, found: list[Compiled]) -> object:
    if isinstance(value, str):
        parts = split(value)
        found += [part for part in parts if isinstance(part, Compiled)]
        return parts[0] if len(parts) == 1 else Parts(tuple(parts))
    if isinstance(value, list):
        return [_compile(item, found) for item in value]
    if isinstance(value, dict):
        return {key: _compile(item, found) for key, item in value.items()}
    return value


def _count(value: Json) -> int:
    """Values of a template, itself included."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(_count(item) for item in inside)


def _render(value: object, variables: Mapping[str, Json], allowance: Allowance | None) -> Json:
    if isinstance(value, Compiled):
        return evaluate(value, variables, allowance)
    if isinstance(value, Parts):
        return "".join(part if isinstance(part, str) else _text(part, variables, allowance) for part in value.parts)
    if isinstance(value, list):
        return [_render(item, variables, allowance) for item in value]
    if isinstance(value, dict):
        return {key: _render(item, variables, allowance) for key, item in value.items()}
    return value  # type: ignore[return-value]


def _text(compiled: Compiled, variables: Mapping[str, Json], allowance: Allowance | None) -> str:
    value = evaluate(compiled, variables, allowance)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if allowance is not None:
        allowance.spend(len(text) // CHARS_PER_UNIT)
    return text


class _TooLarge(Exception):
    """Text: what is wrong with a result."""


def _measure(result: object, allowance: Allowance) -> None:
    """Raises _TooLarge for what is too large or not JSON. Macros can put one large value into a list many times."""
    chars = values = 0
    waiting: list[tuple[object, int]] = [(result, 0)]
    while waiting:
        values += 1
        if values % VALUES_PER_UNIT == 0:
            allowance.spend(1)
        value, depth = waiting.pop()
        chars += len(value) + 2 if isinstance(value, str) else 2
        if isinstance(value, float) and not math.isfinite(value):
            raise _TooLarge("holds a number that is not finite, which JSON has not")
        if isinstance(value, dict):
            chars += sum(map(len, value))
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif kind(value) == "no JSON value":
            raise _TooLarge("is a function or a type, not a value")
        if chars + 2 * len(waiting) > MOST_RESULT_CHARS:
            raise _TooLarge(f"has more than {MOST_RESULT_CHARS} characters of JSON")
        if depth > MOST_RESULT_DEPTH:
            raise _TooLarge(f"nests more than {MOST_RESULT_DEPTH} deep")
    allowance.spend(chars // CHARS_PER_UNIT)  # it is copied as text sooner or later


def _failed(compiled: Compiled, text: str) -> ExpressionFailed:
    return ExpressionFailed(f"`{_shown(compiled.text)}` has no value: {text}")


def _shown(text: str) -> str:
    return text if len(text) <= MOST_SHOWN_CHARS else text[: MOST_SHOWN_CHARS - 3] + "..."

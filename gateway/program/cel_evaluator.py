"""One evaluation of a CEL tree over plain JSON values, with a bound on its work.

celpy's evaluator walks the tree. What it does with values is replaced, through its table of functions and its methods for members and
macros: its own needs a copy of every variable into its types (12 ms for 1 MB against nothing), refuses `1 == 1.0`, takes `list[-1]` for
the last item, and has no bound.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from celpy import celtypes
from celpy.evaluation import Activation, CELEvalError, Evaluator
from lark import Tree

from gateway.program.allowance import Allowance, UsedUp
from gateway.program.cel_operators import Operators, Wrong, both, kind
from gateway.program.cel_syntax import MACROS, Node

MOST_WORK = 50_000  # units: a visited node, a compared or joined item, 256 characters; an item of a macro is five more

logging.getLogger("celpy").setLevel(logging.CRITICAL)  # its lines quote values

_PLAIN = ((celtypes.BoolType, bool), (celtypes.IntType, int), (celtypes.DoubleType, float), (celtypes.StringType, str))


class WorkExceeded(Exception):
    """The evaluation did MOST_WORK units of work. Not an error value: `||` must not swallow it."""


class Work:
    left = MOST_WORK

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise WorkExceeded


def error(text: str) -> CELEvalError:
    return CELEvalError(text)


class CelRun(Evaluator):
    """Evaluates a tree once. Raises CELEvalError (its first argument quotes no values) or WorkExceeded."""

    def __init__(self, ast: Node, activation: Activation, work: Work) -> None:
        super().__init__(ast, activation)
        self._work = work
        self._scope: Activation | None = None

    def set_activation(self, values: Any) -> Evaluator:
        """One scope for all items of a macro: celpy's own copies every variable's cell for each item."""
        if self._scope is None:
            self._scope = self.activation = self.base_activation.nested_activation(vars=values)
        else:
            self._scope.identifiers.load_values(values)
        return self

    def sub_evaluator(self, ast: Node) -> Evaluator:
        return CelRun(ast, self.activation, self._work)

    def visit(self, tree: Node) -> Any:
        self._work.spend(1)
        return super().visit(tree)

    def visit_children(self, tree: Node) -> list[Any]:
        return [self.visit(child) if isinstance(child, Tree) else child for child in tree.children]

    def literal(self, tree: Node) -> Any:
        value = super().literal(tree)
        for celpy_type, plain in _PLAIN:
            if isinstance(value, celpy_type):
                return plain(value)
        return value

    def exprlist(self, tree: Node) -> Any:
        values = self.visit_children(tree)
        return next((value for value in values if isinstance(value, CELEvalError)), values)

    def primary(self, tree: Node) -> Any:
        child = tree.children[0]
        if isinstance(child, Tree) and not child.children:  # `[]` and `{}`
            return [] if child.data == "list_lit" else {}
        return super().primary(tree)

    def mapinits(self, tree: Node) -> Any:
        parts = self.visit_children(tree)
        made: dict[str, Any] = {}
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            for part in (key, value):
                if isinstance(part, CELEvalError):
                    return part
            if not isinstance(key, str):
                return error(f"a key of a map is {kind(key)}: keys of JSON are strings")
            if key in made:
                return error("a map has the same key twice")
            made[key] = value
        return made

    def member_dot(self, tree: Node) -> Any:
        value = self.visit(tree.children[0])  # type: ignore[arg-type]
        return value if isinstance(value, CELEvalError) else _field(value, str(tree.children[1]))

    def macro_has_eval(self, exprlist: Node) -> Any:
        member = exprlist.children[0]
        value = self.visit(member.children[0])  # type: ignore[union-attr, arg-type]
        if isinstance(value, CELEvalError):
            return value
        if not isinstance(value, dict):
            return error(f"has(...): {kind(value)} has no fields")
        return str(member.children[1]) in value  # type: ignore[union-attr]

    def member_dot_arg(self, tree: Node) -> Any:
        name = str(tree.children[1])
        if name not in MACROS:
            return super().member_dot_arg(tree)
        items = self.visit(tree.children[0])  # type: ignore[arg-type]
        if isinstance(items, CELEvalError):
            return items
        if not isinstance(items, list | dict):
            return error(f"{name}(...): {kind(items)} is neither list nor map")
        each = self.build_ss_macro_eval(tree)  # gives error values
        results = []
        for item in items:
            self._work.spend(5)  # a scope for its name
            result = each(item)
            if name != "map" and not isinstance(result, bool | CELEvalError):
                result = error(f"{name}(...): its condition is {kind(result)}, not bool")
            if result is True and name == "exists":
                return True
            if result is False and name == "all":
                return False
            if isinstance(result, CELEvalError) and name not in ("all", "exists"):
                return result
            results.append(result)
        if name == "map":
            return results
        if name == "filter":
            return [item for item, keep in zip(items, results, strict=True) if keep]
        if name == "exists_one":
            return sum(results) == 1
        return next((result for result in results if isinstance(result, CELEvalError)), name == "all")


class _Machine(threading.local):
    """The table of functions and the work that they count, one for each thread: making the table takes longer than most expressions."""

    def __init__(self) -> None:
        self.work = Work()
        self.functions = _functions(self.work)


def run(tree: Node, variables: Mapping[str, Any], allowance: Allowance) -> Any:
    """The value. Raises CELEvalError, WorkExceeded, or UsedUp when the allowance ends before MOST_WORK does."""
    work, most = _machine.work, min(MOST_WORK, allowance.left)
    work.left = most
    activation = Activation(vars=dict(variables), functions=_machine.functions)
    try:
        return CelRun(tree, activation, work).evaluate()
    except WorkExceeded:
        if most < MOST_WORK:
            raise UsedUp from None
        raise
    finally:
        allowance.left -= most - work.left


def _field(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        return error(f"{kind(value)} has no fields, so no `{name}`")
    return value[name] if name in value else error(f"there is no `{name}`")


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, CELEvalError):
                return argument
        try:
            return function(*arguments)
        except Wrong as wrong:
            return error(str(wrong))

    return guarded


def _is_error(value: object) -> bool:
    return isinstance(value, CELEvalError)


def _logical(decisive: bool, sign: str) -> Callable[..., Any]:
    def function(a: Any, b: Any) -> Any:
        try:
            return both(a, b, decisive, _is_error, sign)
        except Wrong as wrong:
            return error(str(wrong))

    return function


def _functions(work: Work) -> dict[str, Any]:
    table = {name: _guarded(function) for name, function in Operators(work.spend).table().items()}
    return {**table, "_||_": _logical(True, "||"), "_&&_": _logical(False, "&&")}


_machine = _Machine()

"""Values of a program's expressions and templates while it runs; each is compiled once."""

from collections.abc import Mapping
from typing import Any, Protocol

from gateway.program.allowance import Allowance, UsedUp
from gateway.program.model import Expression, Json, Template
from gateway.program.problems import RunFailed

Variables = dict[str, Json]


class Language(Protocol):
    """What `gateway.program.expressions` offers. `evaluate` and `render` raise ValueError with a text that holds no values of the run, and
    UsedUp when the allowance ends before they do."""

    def compile_expression(self, text: str) -> Any: ...

    def evaluate(self, compiled: Any, variables: Mapping[str, Json], allowance: Allowance | None = None) -> Json: ...

    def compile_template(self, value: Json) -> Any: ...

    def render(self, compiled: Any, variables: Mapping[str, Json], allowance: Allowance | None = None) -> Json: ...

    def references_of(self, compiled: Any) -> frozenset[str]:
        """Dotted paths of the variables that a compiled expression or template uses, as `steps.search.output.hits`."""
        ...


class Evaluation:
    """May be shared by all runs of one program, so that its expressions are compiled once for all of them; what bounds the work of one
    run is a view of its own (`within`).

    `value`, `holds` and `fill` raise RunFailed, which names the node: EXPRESSION_FAILED, or TOO_MUCH_WORK when the allowance is used up.
    """

    def __init__(self, language: Language) -> None:
        self._language = language
        self._expressions: dict[str, Any] = {}
        self._templates: dict[int, tuple[Template, Any]] = {}  # by identity; the template is kept so that its identity stays its own
        self._allowance: Allowance | None = None

    def within(self, allowance: Allowance) -> "Evaluation":
        """A view that shares what is compiled, and whose evaluations together do no more than the allowance."""
        view = Evaluation(self._language)
        view._expressions, view._templates, view._allowance = self._expressions, self._templates, allowance
        return view

    def value(self, expression: Expression, variables: Variables, node_id: str) -> Json:
        try:
            return self._language.evaluate(self._expression(expression), variables, self._allowance)
        except ValueError as error:
            said = str(error)
            raise RunFailed(node_id, said if expression.text in said else f"{expression.text}: {said}", "EXPRESSION_FAILED") from None
        except UsedUp:
            raise _too_much_work(node_id) from None

    def holds(self, condition: Expression, variables: Variables, node_id: str) -> bool:
        value = self.value(condition, variables, node_id)
        if not isinstance(value, bool):
            raise RunFailed(node_id, f"{condition.text}: gives neither true nor false", "EXPRESSION_FAILED")
        return value

    def fill(self, template: Template, variables: Variables, node_id: str) -> Json:
        try:
            return self._language.render(self._template(template), variables, self._allowance)
        except ValueError as error:
            raise RunFailed(node_id, str(error), "EXPRESSION_FAILED") from None
        except UsedUp:
            raise _too_much_work(node_id) from None

    def references(self, what: Expression | Template) -> frozenset[str]:
        """Dotted paths of the variables that it uses. Raises ValueError for what does not compile."""
        return self._language.references_of(self._expression(what) if isinstance(what, Expression) else self._template(what))

    def _expression(self, expression: Expression) -> Any:
        compiled = self._expressions.get(expression.text)
        if compiled is None:
            compiled = self._expressions[expression.text] = self._language.compile_expression(expression.text)
        return compiled

    def _template(self, template: Template) -> Any:
        known = self._templates.get(id(template))
        if known is None:
            known = self._templates[id(template)] = (template, self._language.compile_template(template.value))
        return known[1]


def _too_much_work(node_id: str) -> RunFailed:
    text = "the expressions of the run have done all the work that a run may do: use smaller lists, fewer macros, or fewer iterations"
    return RunFailed(node_id, text, "TOO_MUCH_WORK")

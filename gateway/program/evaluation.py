"""Values of a program's expressions and templates while it runs; each is compiled once."""

from collections.abc import Mapping
from typing import Any, Protocol

from gateway.program.model import Expression, Json, Template
from gateway.program.problems import RunFailed

Variables = dict[str, Json]


class Language(Protocol):
    """What `gateway.program.expressions` offers. The last two raise ValueError with a text that holds no values of the run."""

    def compile_expression(self, text: str) -> Any: ...

    def evaluate(self, compiled: Any, variables: Mapping[str, Json]) -> Json: ...

    def compile_template(self, value: Json) -> Any: ...

    def render(self, compiled: Any, variables: Mapping[str, Json]) -> Json: ...


class Evaluation:
    """May be shared by all runs of one program, so that its expressions are compiled once for all of them.

    Every method raises RunFailed with reason EXPRESSION_FAILED, which names the node.
    """

    def __init__(self, language: Language) -> None:
        self._language = language
        self._expressions: dict[str, Any] = {}
        self._templates: dict[int, tuple[Template, Any]] = {}  # by identity; the template is kept so that its identity stays its own

    def value(self, expression: Expression, variables: Variables, node_id: str) -> Json:
        compiled = self._expressions.get(expression.text)
        if compiled is None:
            compiled = self._expressions[expression.text] = self._language.compile_expression(expression.text)
        try:
            return self._language.evaluate(compiled, variables)
        except ValueError as error:
            said = str(error)
            raise RunFailed(node_id, said if expression.text in said else f"{expression.text}: {said}", "EXPRESSION_FAILED") from None

    def holds(self, condition: Expression, variables: Variables, node_id: str) -> bool:
        value = self.value(condition, variables, node_id)
        if not isinstance(value, bool):
            raise RunFailed(node_id, f"{condition.text}: gives neither true nor false", "EXPRESSION_FAILED")
        return value

    def fill(self, template: Template, variables: Variables, node_id: str) -> Json:
        known = self._templates.get(id(template))
        if known is None:
            known = self._templates[id(template)] = (template, self._language.compile_template(template.value))
        try:
            return self._language.render(known[1], variables)
        except ValueError as error:
            raise RunFailed(node_id, str(error), "EXPRESSION_FAILED") from None

"""What can be said of a program before it runs: names that are not there, what is never reached, what it can cost at most.

A step sees the steps that ended before it in its block and in the blocks around it. A reference to itself, to a step around it or to a
later one is what a cycle is in this language. Paths are those of the plain form, `steps[2].map.steps[0].input.question`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from gateway.program.bounds import bound
from gateway.program.check_input import misfits
from gateway.program.expressions import Compiled, ExpressionFailed, compile_expression, evaluate, split
from gateway.program.model import Agent, Block, Call, Choose, Expression, Json, Loop, Map, Node, Parallel, Program, Template
from gateway.program.problems import nearest
from gateway.program.reader import join
from gateway.types import Kind, Target

Severity = Literal["error", "warning"]
MOST_SOURCE_CHARS = 65_536  # of all expressions of a program, so that a check takes about a second at most
UNKNOWN = object()  # the value of an expression that is not constant


@dataclass(frozen=True, slots=True)
class Finding:
    """An error keeps the program from running as it stands; a warning is for its author."""

    severity: Severity
    path: str
    text: str


def check(program: Program, targets: Mapping[str, Target] | None = None) -> list[Finding]:
    """All findings, in the order of the program. targets: by scope, `tool.search`; None when they are not known."""
    checker = _Checker(program, targets)
    checker.program()
    return checker.findings


def blocks_of(node: Node) -> list[tuple[str, Block]]:
    """The blocks inside a node, each with its place in the plain form."""
    if isinstance(node, Parallel):
        return [(f"parallel.{name}", block) for name, block in node.branches.items()]
    if isinstance(node, Map):
        return [("map.steps", node.body)]
    if isinstance(node, Choose):
        return [("then", node.then), ("else", node.otherwise)]
    return [("steps", node.body)] if isinstance(node, Loop) else []


@dataclass(frozen=True, slots=True)
class _Scope:
    """What an expression sees: nodes by id, items of maps, whether `loop` is there; and the ids of the nodes around it."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    items: tuple[str, ...] = ()
    has_loop: bool = False
    around: tuple[str, ...] = ()


class _Checker:
    def __init__(self, program: Program, targets: Mapping[str, Target] | None) -> None:
        self.findings: list[Finding] = []
        self._program, self._targets = program, targets
        self._order: dict[str, int] = {}  # ids in the order of the text
        self._parents: dict[str, str] = {}
        self._chars = 0
        self._number(program.steps, "steps", "")

    def program(self) -> None:
        end = self.block(self._program.steps, "steps", _Scope())
        if self._program.output is not None:
            self.template(self._program.output, "output", _Scope(end))
        most = bound(self._program, self._targets)
        if most.steps > self._program.most_steps:
            text = f"may take up to {most.steps} steps, and fails after {self._program.most_steps}: lower the limits of its loops and maps"
            self.warn("limits.steps", text)

    def error(self, path: str, text: str) -> None:
        self.findings.append(Finding("error", path, text))

    def warn(self, path: str, text: str) -> None:
        self.findings.append(Finding("warning", path, text))

    def _number(self, block: Block, path: str, parent: str) -> None:
        for index, node in enumerate(block):
            place = f"{path}[{index}]"
            if node.id in self._order:
                self.error(f"{place}.id", f"`{node.id}` is the id of another step")
            self._order.setdefault(node.id, len(self._order))
            self._parents.setdefault(node.id, parent)
            for name, inner in blocks_of(node):
                self._number(inner, f"{place}.{name}", node.id)

    def block(self, block: Block, path: str, scope: _Scope) -> dict[str, Node]:
        """The nodes that are visible at its end."""
        seen = dict(scope.nodes)
        fails_at = ""
        for index, node in enumerate(block):
            place = f"{path}[{index}]"
            if fails_at:
                self.warn(place, f"is never reached: `{fails_at}` before it always fails")
                fails_at = ""
            if self.node(node, place, _Scope(seen, scope.items, scope.has_loop, scope.around)):
                fails_at = node.id
            seen[node.id] = node
        return seen

    def node(self, node: Node, path: str, scope: _Scope) -> bool:
        """True when it always fails."""
        inside = _Scope(scope.nodes, scope.items, scope.has_loop, (*scope.around, node.id))
        if isinstance(node, Call):
            self.call(node, path, inside)
        elif isinstance(node, Agent):
            self.target(Kind.INFER, node.model, join(path, "agent"))
            self.template(node.messages, join(path, "messages"), inside)
            for name, tool in node.tools.items():
                self.target(tool.kind, tool.target, f"{path}.tools.{name}.{tool.kind.value}")
        elif isinstance(node, Parallel):
            for name, block in blocks_of(node):
                self.block(block, join(path, name), inside)
        elif isinstance(node, Map):
            self.map(node, path, inside)
        elif isinstance(node, Choose):
            value = self.condition(node.condition, join(path, "if"), inside)
            for taken, (name, block) in zip((True, False), blocks_of(node), strict=True):
                if isinstance(value, bool) and value is not taken and block:
                    self.warn(join(path, name), f"is never reached: the condition is always {str(value).lower()}")
                self.block(block, join(path, name), inside)
        else:
            return self.loop(node, path, inside)
        return False

    def call(self, node: Call, path: str, scope: _Scope) -> None:
        target = self.target(node.kind, node.target, join(path, node.kind.value))
        self.template(node.input, join(path, "input"), scope)
        if node.fallback is not None:
            self.template(node.fallback, join(path, "fallback"), scope)
        if target is None:
            return
        if target.input_schema is not None:
            for place, text in misfits(target.input_schema, node.input.value, join(path, "input")):
                self.error(place, f"{text}, as {target.scope} wants it")
        if node.retry.attempts > 1 and not (target.idempotent or target.read_only):
            text = (
                f"{target.scope} is neither idempotent nor read-only: each attempt may act again, unless the tool heeds its idempotency key"
            )
            self.warn(join(path, "retry"), text)

    def map(self, node: Map, path: str, scope: _Scope) -> None:
        value = self.expression(node.over.text, join(path, "map.over"), scope)
        if value is not UNKNOWN and not isinstance(value, list):
            self.error(join(path, "map.over"), "is not a list")
        elif isinstance(value, list) and len(value) > node.most:
            self.error(join(path, "map.over"), f"has {len(value)} items: at most {node.most} are allowed")
        if node.item in scope.items:
            self.error(join(path, "map.as"), f"`{node.item}` is the item of a map around this one")
        self.block(node.body, join(path, "map.steps"), _Scope(scope.nodes, (*scope.items, node.item), scope.has_loop, scope.around))

    def loop(self, node: Loop, path: str, scope: _Scope) -> bool:
        inside = _Scope(scope.nodes, scope.items, True, scope.around)
        value = self.condition(node.condition, join(path, "while"), inside)
        if node.maximum < 1:
            self.error(join(path, "maximum"), "must be 1 or more: a loop without a maximum is not bounded")
        if value is False:
            self.warn(join(path, "steps"), "is never reached: the condition is always false")
        always_fails = value is True and not node.stop_quietly
        if always_fails:
            self.warn(join(path, "while"), f"is always true: the run fails after {node.maximum} iterations, unless `stop_quietly: true`")
        self.block(node.body, join(path, "steps"), inside)
        return always_fails

    def target(self, kind: Kind, name: str, path: str) -> Target | None:
        if kind is Kind.RUN:
            self.error(path, "a run cannot be a step of a run")
            return None
        if self._targets is None:
            return None
        scope = f"{kind.value}.{name}"
        if scope not in self._targets:
            self.error(path, f"there is no target {scope}{nearest(scope, self._targets)}")
        return self._targets.get(scope)

    def condition(self, expression: Expression, path: str, scope: _Scope) -> object:
        value = self.expression(expression.text, path, scope)
        if value is not UNKNOWN and not isinstance(value, bool):
            self.error(path, "is neither true nor false")
        return value

    def expression(self, text: str, path: str, scope: _Scope) -> object:
        """Its value when it is the same in every run, else UNKNOWN."""
        if not self._may_compile(text, path):
            return UNKNOWN
        try:
            compiled = compile_expression(text)
        except ValueError as error:
            self.error(path, str(error))
            return UNKNOWN
        return self.compiled(compiled, path, scope)

    def compiled(self, compiled: Compiled, path: str, scope: _Scope) -> object:
        for reference in sorted(compiled.references):
            self.reference(reference.split("."), path, scope)
        if compiled.references:
            return UNKNOWN
        try:
            return evaluate(compiled, {})
        except ExpressionFailed as error:
            self.error(path, str(error))
            return UNKNOWN

    def _may_compile(self, text: str, path: str) -> bool:
        before, self._chars = self._chars, self._chars + len(text)
        if before <= MOST_SOURCE_CHARS < self._chars:
            self.error(path, f"from here on the program has more than {MOST_SOURCE_CHARS} characters of expressions")
        return self._chars <= MOST_SOURCE_CHARS

    def template(self, template: Template, path: str, scope: _Scope) -> None:
        for place, text in _strings(template.value, path):
            if "${" not in text or not self._may_compile(text, place):
                continue
            try:
                parts = split(text)
            except ValueError as error:
                self.error(place, str(error))
                continue
            for part in parts:
                if isinstance(part, Compiled):
                    self.compiled(part, place, scope)

    def reference(self, names: list[str], path: str, scope: _Scope) -> None:
        root = names[0]
        if root == "steps":
            self.step_reference(names, path, scope)
        elif root == "loop":
            if not scope.has_loop:
                self.error(path, "`loop` is there only inside of a loop")
            elif len(names) > 1 and names[1] not in ("index", "last"):
                self.error(path, f"`loop.{names[1]}` is not there: known are loop.index and loop.last")
        elif root == "input":
            schema = self._program.input_schema or {}
            properties = schema.get("properties")
            if (
                len(names) > 1
                and isinstance(properties, Mapping)
                and schema.get("additionalProperties") is False
                and names[1] not in properties
            ):
                self.error(path, f"the input has no `{names[1]}`{nearest(names[1], properties)}")
        elif root not in scope.items:
            known = ["input", "steps", *scope.items, *(["loop"] if scope.has_loop else [])]
            hint = nearest(root, known) or (f": did you mean `steps.{root}.output`?" if root in self._order else "")
            self.error(path, f"there is no variable `{root}` here{hint}")

    def step_reference(self, names: list[str], path: str, scope: _Scope) -> None:
        if len(names) == 1:
            self.warn(path, "uses `steps` by a name that is computed, which cannot be checked: write `steps.<id>.output`")
            return
        name = names[1]
        node = scope.nodes.get(name)
        if node is None:
            self.error(path, self._unseen(name, scope))
        elif len(names) > 2 and names[2] != "output":
            self.error(path, f"`steps.{name}` has only `output`, no `{names[2]}`")
        elif len(names) > 3 and isinstance(node, Parallel) and names[3] not in node.branches:
            self.error(path, f"`{name}` has no branch `{names[3]}`{nearest(names[3], node.branches)}")

    def _unseen(self, name: str, scope: _Scope) -> str:
        if name not in self._order:
            return f"there is no step `{name}`{nearest(name, self._order)}"
        if scope.around and name == scope.around[-1]:
            return f"`{name}` refers to itself, which is a cycle"
        if name in scope.around:
            return f"`{name}` is the step around this one and has not ended, so this is a cycle"
        here = self._order[scope.around[-1]] if scope.around else len(self._order)
        if self._order[name] > here:
            hint = ": in a loop, `loop.last` is the output of the iteration before" if scope.has_loop else ""
            return f"`{name}` comes later, so this is a cycle{hint}"
        outer = self._parents[name]
        while self._parents.get(outer) and outer not in scope.nodes:
            outer = self._parents[outer]
        if outer in scope.nodes:
            return f"`{name}` is inside of `{outer}`: from here only `steps.{outer}.output` can be seen"
        return f"`{name}` is in another branch, which may not have ended or not be taken"


def _strings(value: Json, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, join(path, key))

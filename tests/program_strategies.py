"""Random programs that are valid over a few targets, for property tests: every kind of node but Agent, all of them small.

The variables of an expression are kept while a program is drawn, so that each reference is to a step that has ended where it stands.
"""

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from gateway.program.model import Block, Call, Choose, Expression, Json, Loop, Map, Node, Parallel, Program, Retry, Template
from gateway.types import Kind, Lane, Target

TARGETS: dict[str, Target] = {
    target.scope: target
    for target in (
        Target(Kind.TOOL, "echo", read_only=True, idempotent=True),
        Target(Kind.TOOL, "send"),
        Target(Kind.INFER, "plan", read_only=True),
        Target(Kind.RETRIEVE, "docs", read_only=True),
    )
}
MOST_NODES = 12


@dataclass
class Scope:
    """What an expression sees where the program is being drawn: names of steps, items of maps, whether there is a loop around."""

    steps: list[str] = field(default_factory=list)
    items: tuple[str, ...] = ()
    is_in_loop: bool = False

    def inside(self, item: str = "", is_loop: bool = False) -> "Scope":
        items = (*self.items, item) if item else self.items
        return Scope(list(self.steps), items, self.is_in_loop or is_loop)

    def variables(self) -> list[str]:
        loop = ["loop.index", "loop.last"] if self.is_in_loop else []
        return ["input", *(f"steps.{name}.output" for name in self.steps), *self.items, *loop]


@dataclass
class Names:
    """Ids that were used, and how many nodes are still allowed."""

    used: int = 0

    def take(self, prefix: str) -> str:
        self.used += 1
        return f"{prefix}{self.used}"

    @property
    def may_nest(self) -> bool:
        return self.used < MOST_NODES


SCALARS: st.SearchStrategy[Json] = st.one_of(
    st.none(), st.booleans(), st.integers(-1000, 1000), st.floats(-1e6, 1e6), st.text(st.sampled_from("ab$ {}\n"), max_size=5)
)


def _literal(value: Json) -> Json:
    """The template that stands for the value itself."""
    return value.replace("${", "$${") if isinstance(value, str) else value


@st.composite
def templates(draw: st.DrawFn, scope: Scope) -> Template:
    variable = draw(st.sampled_from(scope.variables()))
    value: Json = draw(
        st.one_of(
            SCALARS.map(_literal),
            st.just(f"${{{variable}}}"),
            st.just(f"a ${{{variable}}} b"),
            st.just({"value": f"${{{variable}}}", "list": [1, f"${{{variable} == null}}"]}),
        )
    )
    return Template(value)


@st.composite
def conditions(draw: st.DrawFn, scope: Scope) -> Expression:
    variable = draw(st.sampled_from(scope.variables()))
    text = draw(st.sampled_from(["{0} == null", "{0} != null", "{0} == 1", "!({0} == {0})"]))
    return Expression(text.format(variable))


@st.composite
def lists(draw: st.DrawFn, scope: Scope) -> Expression:
    variable = draw(st.sampled_from(scope.variables()))
    return Expression(draw(st.sampled_from(["[]", "[1, 2, 3]", f"[{variable}]", f"[{variable}, null, 'a']"])))


@st.composite
def calls(draw: st.DrawFn, scope: Scope, names: Names) -> Call:
    target = draw(st.sampled_from(sorted(TARGETS)))
    kind, name = target.split(".")
    return Call(
        names.take("s"),
        Kind(kind),
        name,
        draw(templates(scope)),
        lane=draw(st.sampled_from([None, *Lane])),
        timeout_s=draw(st.sampled_from([None, 0.5, 30.0])),
        retry=draw(st.sampled_from([Retry(), Retry(attempts=2), Retry(3, 0.01, 0.1, 1.5)])),
        fallback=draw(st.one_of(st.none(), templates(scope))),
    )


@st.composite
def nodes(draw: st.DrawFn, scope: Scope, names: Names, depth: int) -> Node:
    what = draw(st.sampled_from(["call", "parallel", "map", "choose", "loop"])) if depth and names.may_nest else "call"
    if what == "parallel":
        branches = draw(st.lists(st.sampled_from(["left", "right", "third"]), min_size=1, max_size=3, unique=True))
        return Parallel(names.take("p"), {branch: draw(blocks(scope.inside(), names, depth - 1)) for branch in branches})
    if what == "map":
        item = names.take("item")
        over = draw(lists(scope))
        body = draw(blocks(scope.inside(item=item), names, depth - 1))
        return Map(names.take("m"), over, item, body, at_once=draw(st.integers(1, 4)), most=draw(st.integers(3, 5)))
    if what == "choose":
        condition = draw(conditions(scope))
        then = draw(blocks(scope.inside(), names, depth - 1))
        otherwise = draw(st.one_of(st.just(()), blocks(scope.inside(), names, depth - 1)))
        return Choose(names.take("c"), condition, then, otherwise)
    if what == "loop":
        body = draw(blocks(scope.inside(is_loop=True), names, depth - 1))
        most = draw(st.integers(1, 3))
        condition = draw(
            st.one_of(conditions(scope), st.just(Expression(f"loop.index < {most}")), st.just(Expression("loop.last == null")))
        )
        return Loop(names.take("l"), condition, most, body, stop_quietly=draw(st.booleans()))
    return draw(calls(scope, names))


@st.composite
def blocks(draw: st.DrawFn, scope: Scope, names: Names, depth: int) -> Block:
    """One to three nodes; the scope that is given gets their ids, one after the other."""
    made: list[Node] = []
    for _ in range(draw(st.integers(1, 3))):
        node = draw(nodes(scope, names, depth))
        scope.steps.append(node.id)
        made.append(node)
    return tuple(made)


@st.composite
def programs(draw: st.DrawFn, depth: int = 2) -> Program:
    """A valid program. It may fail at run time (a loop that reaches its maximum), never for a name that is not there."""
    scope = Scope()
    steps = draw(blocks(scope, Names(), depth))
    program = Program("random", steps, at_once=draw(st.integers(1, 4)))
    if draw(st.booleans()):
        program = replace(program, output=draw(templates(scope)), regions=("home",), description="made by a test")
    return program

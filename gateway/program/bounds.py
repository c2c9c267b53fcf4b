"""The most that a run of a program can take, whatever its values are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gateway.program.model import Agent, Block, Call, Choose, Loop, Map, Node, Parallel, Program
from gateway.types import Kind, Target


@dataclass(frozen=True, slots=True)
class Bound:
    """steps: calls, each counted once whatever its attempts. cost: units, each attempt counted; 1 for a target that is not known.

    Of an agent it is assumed that each iteration calls each of its tools at most once; a model may call one several times, until the
    run's limit of steps or the budget ends it.
    """

    steps: int = 0
    cost: float = 0.0

    def __add__(self, other: "Bound") -> "Bound":
        return Bound(self.steps + other.steps, self.cost + other.cost)

    def times(self, count: int) -> "Bound":
        return Bound(self.steps * count, self.cost * count)


def bound(program: Program, targets: Mapping[str, Target] | None = None) -> Bound:
    """targets: by scope, `tool.search`. Not cut by the program's own limits, so that it can be compared with them."""
    return _block(program.steps, targets or {})


def scopes(program: Program) -> frozenset[str]:
    """Everything that a run of the program may call, as `tool.search`."""
    return frozenset(_scopes(program.steps))


def _scopes(block: Block) -> Iterator[str]:
    for node in block:
        if isinstance(node, Call):
            yield f"{node.kind.value}.{node.target}"
        elif isinstance(node, Agent):
            yield f"{Kind.INFER.value}.{node.model}"
            yield from (f"{tool.kind.value}.{tool.target}" for tool in node.tools.values())
        elif isinstance(node, Parallel):
            for branch in node.branches.values():
                yield from _scopes(branch)
        elif isinstance(node, Choose):
            yield from _scopes((*node.then, *node.otherwise))
        else:
            yield from _scopes(node.body)


def _block(block: Block, targets: Mapping[str, Target]) -> Bound:
    return sum((_node(node, targets) for node in block), Bound())


def _node(node: Node, targets: Mapping[str, Target]) -> Bound:
    if isinstance(node, Call):
        return Bound(1, _cost(node.kind, node.target, targets) * node.retry.attempts)
    if isinstance(node, Parallel):
        return sum((_block(block, targets) for block in node.branches.values()), Bound())
    if isinstance(node, Map):
        return _block(node.body, targets).times(node.most)
    if isinstance(node, Loop):
        return _block(node.body, targets).times(node.maximum)
    if isinstance(node, Choose):
        then, otherwise = _block(node.then, targets), _block(node.otherwise, targets)
        return Bound(max(then.steps, otherwise.steps), max(then.cost, otherwise.cost))
    return _agent(node, targets)


def _agent(node: Agent, targets: Mapping[str, Target]) -> Bound:
    once = Bound(1, _cost(Kind.INFER, node.model, targets))
    for tool in node.tools.values():
        once += Bound(1, _cost(tool.kind, tool.target, targets))
    most = once.times(node.budget.iterations)
    return Bound(most.steps, min(most.cost, node.budget.cost + once.cost))  # the budget is looked at between iterations


def _cost(kind: Kind, name: str, targets: Mapping[str, Target]) -> float:
    target = targets.get(f"{kind.value}.{name}")
    return target.cost if target is not None else 1.0

"""Which calls may come next, before it is known that they do: guesses of what a run will ask for, for a runner that has room to spare.

From a block that is open, at the node that runs in it, these are looked at:

    the node after it   a Call; the first call of each branch of a Choose or Parallel, and so on inside of these
    nodes after that    Calls

A Choose whose condition is known already has one branch, else both. What is in a Map, a Loop or an Agent that has not begun is not looked
at, since its values or whether it happens at all follow from what is not known.

A call is offered when its input refers only to what is known, so that it is exactly the call that the run will ask for, if it does; and
when it and everything that comes before it and has not ended, the node that runs included, only read. Otherwise a step that reads could
be made before a step that writes what it is meant to see, although neither uses the other's output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from gateway.program import model
from gateway.program.allowance import Allowance
from gateway.program.bounds import scopes
from gateway.program.commands import StartCall
from gateway.program.evaluation import Evaluation
from gateway.program.frames import Block
from gateway.program.model import Call, Choose, Expression, Node, Parallel, Program, Template
from gateway.program.problems import RunFailed
from gateway.types import Kind

if TYPE_CHECKING:
    from gateway.program.machine import Machine

# What a look may cost, since it is taken after every event of a run: some milliseconds, whatever the program is.
MOST_BLOCKS = 32  # those that were opened last
MOST_NODES = 8  # ahead in each
MOST_CALLS = 256
MOST_WORK = 500  # units
MOST_RUN_WORK = 50_000  # units for all looks of a run together

ReadsOnly = Callable[[Kind, str], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """start: as the engine would ask for it. The rest is for `Engine.may_come`: the block and the place in it that it would come from."""

    start: StartCall
    block: Block
    index: int


@dataclass(frozen=True, slots=True)
class _Found:
    """unknown: conditions on which it depends that nobody knows yet."""

    call: Call
    block: Block
    index: int
    unknown: int


class Lookahead:
    """Remembers what it has offered or could not fill in; of the run it changes nothing."""

    def __init__(self, machine: "Machine", evaluation: Evaluation) -> None:
        self._machine = machine
        self._evaluation = evaluation
        self._left = MOST_RUN_WORK
        self._done: set[str] = set()  # keys of calls
        self._holds: dict[str, bool | None] = {}  # conditions by key; None for one that fails
        self._scopes: dict[int, frozenset[str]] = {}  # by the identity of a node

    def calls(self, reads_only: ReadsOnly, most: int) -> list[Ahead]:
        """At most `most` of them, and none twice."""
        granted = min(MOST_WORK, self._left)
        allowance = Allowance(granted)
        evaluation = self._evaluation.within(allowance)
        found = sorted(islice(self._found(evaluation, reads_only), MOST_CALLS), key=lambda one: one.unknown)
        offered: list[Ahead] = []
        for one in found:
            key = one.block.key(one.call.id)
            if len(offered) == most or allowance.left <= 0:
                break
            if key in self._done or not self._is_known(one.call.input, one.block):
                continue
            self._done.add(key)
            call = one.call
            try:
                given = evaluation.fill(call.input, one.block.variables, call.id)
            except RunFailed:
                continue
            start = StartCall(key, 1, call.id, call.kind, call.target, given, call.lane, call.timeout_s)
            offered.append(Ahead(start, one.block, one.index))
        self._left -= granted - max(0, allowance.left)
        return offered

    def may_come(self, ahead: Ahead) -> bool:
        is_ahead = ahead.block in self._machine.blocks and ahead.block.position < ahead.index
        return is_ahead or self._machine.calls.is_queued(ahead.start.key)

    # ---- what is ahead

    def _found(self, evaluation: Evaluation, reads_only: ReadsOnly) -> Iterator[_Found]:
        for block in islice(reversed(self._machine.blocks), MOST_BLOCKS):
            at = block.position
            for index in range(at, min(at + 1 + MOST_NODES, len(block.nodes))):
                node = block.nodes[index]
                if index == at + 1 or (index > at and isinstance(node, Call)):
                    yield from self._first(node, block, index, 0, evaluation, reads_only)
                if not all(reads_only(Kind(kind), name) for kind, _, name in map(_split, self._of(node))):
                    break

    def _first(self, node: Node, block: Block, index: int, unknown: int, evaluation: Evaluation, reads_only: ReadsOnly) -> Iterator[_Found]:
        """The calls that are made first when the node begins."""
        if isinstance(node, Call):
            if reads_only(node.kind, node.target):
                yield _Found(node, block, index, unknown)
            return
        branches: list[model.Block] = []
        if isinstance(node, Choose):
            holds = self._condition(node, block, evaluation)
            branches = [node.then, node.otherwise] if holds is None else [node.then if holds else node.otherwise]
            unknown += holds is None
        elif isinstance(node, Parallel):
            branches = list(node.branches.values())
        for branch in branches:
            if branch:
                yield from self._first(branch[0], block, index, unknown, evaluation, reads_only)

    def _condition(self, node: Choose, block: Block, evaluation: Evaluation) -> bool | None:
        """None when it is not known."""
        key = block.key(node.id)
        if key not in self._holds:
            if not self._is_known(node.condition, block):
                return None
            try:
                self._holds[key] = evaluation.holds(node.condition, block.variables, node.id)
            except RunFailed:
                self._holds[key] = None
        return self._holds[key]

    def _is_known(self, what: Expression | Template, block: Block) -> bool:
        """Only steps have to be: what else a block sees it sees from its beginning."""
        try:
            paths = [path.split(".") for path in self._evaluation.references(what)]
        except ValueError:
            return False
        return all(path[0] != "steps" or (len(path) > 1 and path[1] in block.steps) for path in paths)

    def _of(self, node: Node) -> frozenset[str]:
        """What it may call."""
        found = self._scopes.get(id(node))
        if found is None:
            found = self._scopes[id(node)] = scopes(Program("", (node,)))
        return found


def _split(scope: str) -> tuple[str, str, str]:
    return scope.partition(".")

"""What a run has in execution: blocks, and the nodes of several blocks that own them. Frames know no commands; they ask the Machine.

Each frame ends by `machine.ended(block, output)`, which puts its block back on the agenda: nothing here calls deeper for a later node or
iteration, so the stack does not grow with a run.
"""

from typing import TYPE_CHECKING, Protocol

from gateway.program import model
from gateway.program.calls import Asked
from gateway.program.commands import StartCall
from gateway.program.evaluation import Variables
from gateway.program.journal import Completed, Failed
from gateway.program.model import Json
from gateway.program.problems import RunFailed

if TYPE_CHECKING:
    from gateway.program.machine import Machine


class Owner(Protocol):
    """Who is told that one of its blocks has ended, and what its last output was."""

    def closed(self, machine: "Machine", slot: int, last: Json) -> None: ...


class Block:
    """A block in execution.

    variables are its own: inner blocks get a copy, so they see what came before them and nothing of theirs is seen outside.
    indices: of the iterations it is in, outermost first. order: its place in the program, for the order of calls.
    """

    __slots__ = ("indices", "keys", "last", "nodes", "order", "owner", "position", "slot", "steps", "variables")

    def __init__(
        self, nodes: model.Block, variables: Variables, owner: Owner | None, slot: int, indices: tuple[int, ...], order: tuple[int, ...]
    ) -> None:
        steps = variables.get("steps")
        self.nodes = nodes
        self.steps: dict[str, Json] = dict(steps) if isinstance(steps, dict) else {}
        self.variables: Variables = {**variables, "steps": self.steps}
        self.owner = owner
        self.slot = slot
        self.indices = indices
        self.order = order
        self.position = 0
        self.last: Json = None
        self.keys: list[str] = []

    def inside(self, nodes: model.Block, owner: Owner, slot: int, index: int | None = None, more: Variables | None = None) -> "Block":
        """A block of the node that this one is at. index: of the iteration, where there is one; more: what else it sees."""
        indices = self.indices if index is None else (*self.indices, index)
        return Block(nodes, {**self.variables, **(more or {})}, owner, slot, indices, (*self.order, self.position, slot))

    def key(self, node_id: str) -> str:
        return f"{node_id}/{'.'.join(map(str, self.indices))}" if self.indices else node_id


class CallFrame:
    def __init__(self, node: model.Call, block: Block) -> None:
        self._node, self._block = node, block

    def begin(self, machine: "Machine") -> None:
        node, block = self._node, self._block
        filled = machine.evaluation.fill(node.input, block.variables, node.id)
        start = StartCall(block.key(node.id), 1, node.id, node.kind, node.target, filled, node.lane, node.timeout_s)
        machine.ask(Asked((*block.order, block.position), start, self, node.retry))

    def done(self, machine: "Machine", call: Asked, outcome: Completed | Failed) -> None:
        node = self._node
        if isinstance(outcome, Completed):
            machine.ended(self._block, outcome.output)
        elif node.fallback is not None:
            machine.ended(self._block, machine.evaluation.fill(node.fallback, self._block.variables, node.id))
        else:
            raise step_failed(node.id, outcome)


class ParallelFrame:
    def __init__(self, node: model.Parallel, block: Block) -> None:
        self._node, self._block = node, block
        self._names = list(node.branches)
        self._outputs: dict[str, Json] = dict.fromkeys(self._names)  # in the program's order, whichever ends first
        self._open = len(self._names)

    def begin(self, machine: "Machine") -> None:
        for slot, name in enumerate(self._names):
            machine.open(self._block.inside(self._node.branches[name], self, slot))
        if not self._open:
            machine.ended(self._block, {})

    def closed(self, machine: "Machine", slot: int, last: Json) -> None:
        self._outputs[self._names[slot]] = last
        self._open -= 1
        if not self._open:
            machine.ended(self._block, self._outputs)


class MapFrame:
    """Its items' blocks are made when their turn comes, so that a long list costs no more than `at_once` of them."""

    def __init__(self, node: model.Map, block: Block) -> None:
        self._node, self._block = node, block
        self._items: list[Json] = []
        self._outputs: list[Json] = []
        self._next = self._ended = 0

    def begin(self, machine: "Machine") -> None:
        node = self._node
        items = machine.evaluation.value(node.over, self._block.variables, node.id)
        if not isinstance(items, list):
            raise RunFailed(node.id, f"{node.over.text} gives no list", "NOT_A_LIST")
        if len(items) > node.most:
            raise RunFailed(node.id, f"{node.over.text} gives {len(items)} items, at most {node.most} are allowed", "TOO_MANY_ITEMS")
        self._items, self._outputs = items, [None] * len(items)
        if not items:
            machine.ended(self._block, [])
        for _ in range(min(node.at_once, len(items))):
            self._open_next(machine)

    def closed(self, machine: "Machine", slot: int, last: Json) -> None:
        self._outputs[slot] = last
        self._ended += 1
        if self._next < len(self._items):
            self._open_next(machine)
        elif self._ended == len(self._items):
            machine.ended(self._block, self._outputs)

    def _open_next(self, machine: "Machine") -> None:
        index, self._next = self._next, self._next + 1
        machine.open(self._block.inside(self._node.body, self, index, index, {self._node.item: self._items[index]}))


class ChooseFrame:
    def __init__(self, node: model.Choose, block: Block) -> None:
        self._node, self._block = node, block

    def begin(self, machine: "Machine") -> None:
        node = self._node
        taken = machine.evaluation.holds(node.condition, self._block.variables, node.id)
        machine.open(self._block.inside(node.then if taken else node.otherwise, self, 0))

    def closed(self, machine: "Machine", slot: int, last: Json) -> None:
        machine.ended(self._block, last)


class LoopFrame:
    def __init__(self, node: model.Loop, block: Block) -> None:
        self._node, self._block = node, block
        self._key = block.key(node.id)

    def begin(self, machine: "Machine") -> None:
        self._iterate(machine, 0, None)

    def closed(self, machine: "Machine", slot: int, last: Json) -> None:
        self._iterate(machine, slot + 1, last)

    def _iterate(self, machine: "Machine", index: int, last: Json) -> None:
        """Begins iteration `index`, if the condition still holds then."""
        node = self._node
        iteration = self._block.inside(node.body, self, index, index, {"loop": {"index": index, "last": last}})
        holds = machine.evaluation.holds(node.condition, iteration.variables, node.id)
        if holds and index == node.maximum and not node.stop_quietly:
            raise RunFailed(node.id, f"{node.condition.text} still holds after {node.maximum} iterations", "LOOP_MAXIMUM")
        if holds and index < node.maximum:
            machine.iterations[self._key] = index
            machine.open(iteration)
        else:
            machine.iterations.pop(self._key, None)
            machine.ended(self._block, last)


def step_failed(node_id: str, failed: Failed) -> RunFailed:
    told = f": {failed.message}" if failed.message else ""
    tries = f" after {failed.attempt} attempts" if failed.attempt > 1 else ""
    return RunFailed(node_id, f"{failed.error_code} {failed.reason}{tries}{told}", "STEP_FAILED")

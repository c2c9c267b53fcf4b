"""Executes frames: an agenda of blocks that can go on, and what they have asked for. Raises RunFailed when the run cannot go on."""

from collections import deque
from collections.abc import Mapping

from gateway.program import model
from gateway.program.agent_frame import AgentFrame
from gateway.program.allowance import Allowance
from gateway.program.calls import Asked, Calls
from gateway.program.commands import Cancel, Command, Finish, Wait
from gateway.program.evaluation import Evaluation
from gateway.program.frames import Block, CallFrame, ChooseFrame, LoopFrame, MapFrame, ParallelFrame
from gateway.program.journal import Completed, Failed
from gateway.program.model import Json, Node, Program
from gateway.program.problems import RunFailed

# Turns of blocks: a node begun, or a block ended. Without a limit, nested loops that call nothing could keep it busy for ever.
FREE_TURNS = 10_000
TURNS_PER_STEP = 10


class Machine:
    """The state of one run. commands: what has been asked of the runner since they were last taken."""

    def __init__(self, program: Program, input: Json, evaluation: Evaluation, schemas: Mapping[str, Json], most_work: int) -> None:
        self.evaluation = evaluation.within(Allowance(most_work))
        self.schemas = schemas  # of targets' inputs, by scope such as `tool.docs`
        self.commands: list[Command] = []
        self.calls = Calls(program.at_once)
        self.waits: dict[str, tuple[Wait, AgentFrame]] = {}
        self.iterations: dict[str, int] = {}  # that loops and agents are in, by key
        self.outputs: dict[str, Json] = {}
        self.steps_done = 0
        self._program = program
        root = Block(program.steps, {"input": input, "steps": {}}, None, 0, (), ())
        self.blocks: dict[Block, None] = {root: None}  # that are open, as a set that keeps their order
        self._agenda: deque[Block] = deque([root])
        self._steps = self._turns = 0

    def go_on(self) -> None:
        """Executes until everything waits for an outcome or the run has ended; calls start last, when all that could be asked for is."""
        while self._agenda:
            block = self._agenda.popleft()
            node = block.nodes[block.position] if block.position < len(block.nodes) else None
            self._count_turn(node)
            if node is None:
                self._close(block)
            else:
                _frame(node, block).begin(self)
        self.commands.extend(self.calls.start_next())

    def outcome(self, outcome: Completed | Failed) -> None:
        """Raises JournalMismatch, before anything is changed."""
        call = self.calls.find(outcome)
        if isinstance(outcome, Failed) and outcome.retryable and outcome.attempt < call.retry.attempts:
            self.commands.append(self.calls.try_again(call))
            return
        self.calls.end(call)
        self.steps_done += 1
        call.asker.done(self, call, outcome)

    def fired(self, key: str) -> None:
        """A wait that nobody needs any more may fire, too: that is not the runner's fault."""
        start = self.calls.fired(key)
        if start is not None:
            self.commands.append(start)
        elif key in self.waits:
            self.waits.pop(key)[1].fired()

    def stop(self) -> None:
        """Forgets what was under way; `outputs` stay."""
        self._agenda.clear()
        self.blocks.clear()
        self.calls.clear()
        self.waits.clear()
        self.commands.clear()

    # ---- for frames

    def open(self, block: Block) -> None:
        self.blocks[block] = None
        self._agenda.append(block)

    def ended(self, block: Block, output: Json) -> None:
        """The node that the block is at gave output: on with the next one."""
        node_id = block.nodes[block.position].id
        key = block.key(node_id)
        block.steps[node_id] = {"output": output}
        block.keys.append(key)
        block.last = self.outputs[key] = output
        block.position += 1
        self._agenda.append(block)

    def ask(self, call: Asked) -> None:
        self._steps += 1
        if self._steps > self._program.most_steps:
            raise RunFailed(call.start.node_id, f"the run needs more than {self._program.most_steps} steps", "TOO_MANY_STEPS")
        self.calls.add(call)

    def wait(self, key: str, delay_s: float, frame: AgentFrame) -> None:
        wait = Wait(key, delay_s, is_retry=False)
        self.waits[key] = (wait, frame)
        self.commands.append(wait)

    def drop_wait(self, key: str) -> None:
        del self.waits[key]
        self.commands.append(Cancel(key))

    # ---- blocks

    def _count_turn(self, node: Node | None) -> None:
        self._turns += 1
        if self._turns > FREE_TURNS + TURNS_PER_STEP * self._program.most_steps:
            text = "the run goes through too many nodes and iterations for the steps that it may execute"
            raise RunFailed(node.id if node else "", text, "TOO_MANY_STEPS")

    def _close(self, block: Block) -> None:
        del self.blocks[block]
        if block.owner is None:
            template, last = self._program.output, block.last
            self.commands.append(Finish(last if template is None else self.evaluation.fill(template, block.variables, "")))
            return
        for key in block.keys:
            del self.outputs[key]
        block.owner.closed(self, block.slot, block.last)


def _frame(node: Node, block: Block) -> CallFrame | ParallelFrame | MapFrame | ChooseFrame | LoopFrame | AgentFrame:
    match node:
        case model.Call():
            return CallFrame(node, block)
        case model.Parallel():
            return ParallelFrame(node, block)
        case model.Map():
            return MapFrame(node, block)
        case model.Choose():
            return ChooseFrame(node, block)
        case model.Loop():
            return LoopFrame(node, block)
        case model.Agent():
            return AgentFrame(node, block)

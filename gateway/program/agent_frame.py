"""An agent in execution: its model is asked, its calls are made side by side, until the model answers or a budget is used up."""

import re
from typing import TYPE_CHECKING

from gateway.program import model
from gateway.program.agent import Answer, Nonsense, ToolCall, ToolCalls, request, tokens_used, understand
from gateway.program.calls import Asked
from gateway.program.commands import StartCall
from gateway.program.frames import Block, step_failed
from gateway.program.journal import Completed, Failed
from gateway.program.model import Json
from gateway.program.problems import RunFailed
from gateway.types import Kind

if TYPE_CHECKING:
    from gateway.program.machine import Machine

MOST_NONSENSE = 3  # answers in a row that are not understood
_MODEL = -1  # the slot of a call to the model; those of its tools count from 0


class AgentFrame:
    """A failed tool is told to the model; a failed model, a budget that is used up or repeated nonsense fails the run."""

    def __init__(self, node: model.Agent, block: Block) -> None:
        self._node, self._block = node, block
        self._key = block.key(node.id)
        self._messages: list[Json] = []
        self._iteration = 0
        self._cost = 0.0
        self._tokens = 0
        self._nonsense = 0
        self._calls: tuple[ToolCall, ...] = ()
        self._outcomes: dict[int, Completed | Failed] = {}

    def begin(self, machine: "Machine") -> None:
        node = self._node
        messages = machine.evaluation.fill(node.messages, self._block.variables, node.id)
        if not isinstance(messages, list):
            raise RunFailed(node.id, "its messages are no list", "NOT_A_LIST")
        self._messages = list(messages)
        machine.wait(self._key, node.budget.wall_s, self)
        self._ask_model(machine)

    def done(self, machine: "Machine", call: Asked, outcome: Completed | Failed) -> None:
        if call.slot == _MODEL:
            self._model_done(machine, outcome)
            return
        self._outcomes[call.slot] = outcome
        if len(self._outcomes) < len(self._calls):
            return
        for slot, asked in enumerate(self._calls):  # in this order whichever came first, so that costs add up to the same to the last bit
            self._cost += self._outcomes[slot].cost
            self._messages.append(_tool_message(asked, self._outcomes[slot]))
        self._ask_model(machine)

    def fired(self) -> None:
        raise self._exhausted(f"wall_s ({self._node.budget.wall_s:g})")

    def _ask_model(self, machine: "Machine") -> None:
        self._check_budget()
        node, budget = self._node, self._node.budget
        machine.iterations[self._key] = self._iteration
        tools: list[Json] = [_told(name, tool, machine) for name, tool in node.tools.items()]
        left = budget.iterations - self._iteration - 1
        asked = request(list(self._messages), tools, left, budget.tokens - self._tokens, budget.cost - self._cost)
        self._ask(machine, _MODEL, "", Kind.INFER, node.model, asked)

    def _model_done(self, machine: "Machine", outcome: Completed | Failed) -> None:
        if isinstance(outcome, Failed):
            raise step_failed(self._node.id, outcome)
        iteration = self._iteration
        self._iteration += 1
        self._cost += outcome.cost
        self._tokens += tokens_used(outcome.output, outcome.tokens)
        wanted = understand(outcome.output, self._node.tools.keys())
        if isinstance(wanted, Answer):
            self._end(machine, wanted.value)
        elif isinstance(wanted, Nonsense):
            self._answer_nonsense(machine, outcome.output, wanted)
        else:
            self._check_budget()  # before the tools: nothing is called whose result the model could not see
            self._nonsense = 0
            self._call_tools(machine, iteration, wanted)

    def _call_tools(self, machine: "Machine", iteration: int, wanted: ToolCalls) -> None:
        self._messages.append(wanted.message)
        self._calls, self._outcomes = wanted.calls, {}
        for slot, call in enumerate(wanted.calls):
            tool = self._node.tools[call.tool]
            name = re.sub(r"[^A-Za-z0-9_-]", "_", call.tool)
            self._ask(machine, slot, f"/{name}.{slot}", tool.kind, tool.target, call.input, iteration)

    def _ask(self, machine: "Machine", slot: int, suffix: str, kind: Kind, target: str, value: Json, iteration: int | None = None) -> None:
        iteration = self._iteration if iteration is None else iteration
        indices = ".".join(str(index) for index in (*self._block.indices, iteration))
        start = StartCall(f"{self._node.id}/{indices}{suffix}", 1, self._node.id, kind, target, value)
        machine.ask(Asked((*self._block.order, self._block.position, iteration, slot), start, self, slot=slot))

    def _answer_nonsense(self, machine: "Machine", output: Json, nonsense: Nonsense) -> None:
        self._nonsense += 1
        if self._nonsense == MOST_NONSENSE:
            text = f"the model's answer was not understood {MOST_NONSENSE} times in a row, the last time because {nonsense.problem}"
            raise RunFailed(self._node.id, text, "MODEL_NONSENSE")
        problem = f"{nonsense.problem}: {nonsense.detail}" if nonsense.detail else nonsense.problem
        content = f'This was not understood: {problem}. Give {{"answer": ...}} or {{"calls": [{{"id", "tool", "input"}}]}}.'
        self._messages += [{"role": "assistant", "invalid": output}, {"role": "system", "content": content}]
        self._ask_model(machine)

    def _end(self, machine: "Machine", answer: Json) -> None:
        machine.drop_wait(self._key)
        machine.iterations.pop(self._key, None)
        messages: list[Json] = [*self._messages, {"role": "assistant", "answer": answer}]
        machine.ended(self._block, {"answer": answer, "messages": messages, "iterations": self._iteration})

    def _check_budget(self) -> None:
        budget = self._node.budget
        if self._iteration >= budget.iterations:
            raise self._exhausted(f"iterations ({budget.iterations})")
        if self._cost >= budget.cost:
            raise self._exhausted(f"cost ({budget.cost:g})")
        if self._tokens >= budget.tokens:
            raise self._exhausted(f"tokens ({budget.tokens})")

    def _exhausted(self, what: str) -> RunFailed:
        return RunFailed(self._node.id, f"the agent's budget of {what} is used up before it answered", "BUDGET_EXHAUSTED")


def _told(name: str, tool: model.Tool, machine: "Machine") -> Json:
    told: dict[str, Json] = {"name": name, "description": tool.description}
    schema = machine.schemas.get(f"{tool.kind.value}.{tool.target}")
    return told if schema is None else {**told, "input_schema": schema}


def _tool_message(call: ToolCall, outcome: Completed | Failed) -> Json:
    message: dict[str, Json] = {"role": "tool", "call": call.id, "tool": call.tool}
    if isinstance(outcome, Completed):
        return {**message, "output": outcome.output}
    return {**message, "error": {"code": outcome.error_code, "reason": outcome.reason, "message": outcome.message}}

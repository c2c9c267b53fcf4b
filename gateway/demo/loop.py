"""One loop, driven in two ways: by a client that makes each call itself, and as a run of the same program (research.yaml)."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import cast

from gateway.client import NearloopClient
from gateway.client_run_values import RunOutput
from gateway.demo.agent import AgentError, Body
from gateway.demo.backend import CALL_TIMEOUT_S
from gateway.program import agent
from gateway.program.model import Agent, Json
from gateway.program.parse import load_text
from gateway.run_types import Placement, StepEnded, StepStarted, Summary
from gateway.types import Kind

PROGRAM = Path(__file__).with_name("research.yaml")
RUN_TIMEOUT_S = 60.0
ORIGIN = "home"  # the region of client and gateway, see demo.toml


@dataclass(frozen=True, slots=True)
class Told:
    """A call of the loop, and when the client heard of its end, seconds from the beginning."""

    what: str  # infer plan
    region: str  # whose worker executed it
    at_s: float


@dataclass(frozen=True, slots=True)
class Driven:
    """One way through the loop. crossings: how often something waited for the way between two regions and back."""

    answer: Body
    calls: tuple[Told, ...]
    wall_s: float
    crossings: int
    summary: Summary | None = None  # of a run


@dataclass(frozen=True, slots=True)
class Both:
    """The same question by the client and as a run; each is the median of several, made in turn."""

    by_client: Driven
    as_run: Driven
    placement: Placement


def agent_node() -> Agent:
    """The loop of the program: its one agent."""
    program = load_text(PROGRAM.read_text(), PROGRAM.name)
    return next(node for node in program.steps if isinstance(node, Agent))


async def compare(client: NearloopClient, question: str, rounds: int = 3) -> Both:
    """Raises NearloopError; AgentError also when the answers differ."""
    placement = await client.place_run(PROGRAM, {"question": question})
    by_client: list[Driven] = []
    as_run: list[Driven] = []
    for _ in range(rounds):
        by_client.append(await drive(client, question))
        as_run.append(await run(client, question))
    answers = {str(one.answer["answer"]) for one in (*by_client, *as_run)}
    if len(answers) > 1:
        raise AgentError(f"the two ways came to different answers: {' | '.join(sorted(answers))}")
    return Both(_median(by_client), _median(as_run), placement)


def _median(driven: list[Driven]) -> Driven:
    wall_s = median_low(one.wall_s for one in driven)
    return next(one for one in driven if one.wall_s == wall_s)


async def drive(client: NearloopClient, question: str) -> Driven:
    """The loop as a client drives it: each call is an Execute at its gateway. Raises NearloopError, AgentError."""
    node, began_s = agent_node(), time.perf_counter()
    calls: list[Told] = []

    async def call(kind: Kind, target: str, body: Json) -> Json:
        result = await client.execute(kind, target, cast(Body, body), timeout_s=CALL_TIMEOUT_S)
        calls.append(Told(f"{kind.value} {target}", result.region, time.perf_counter() - began_s))
        return cast(Json, result.json)

    messages: list[Json] = [{"role": "user", "content": question}]
    tools: list[Json] = [{"name": name, "description": tool.description} for name, tool in node.tools.items()]
    for left in reversed(range(node.budget.iterations)):
        asked = agent.request(messages, tools, left, node.budget.tokens, node.budget.cost)
        match agent.understand(await call(Kind.INFER, node.model, asked), node.tools.keys()):
            case agent.Answer(value):
                crossings = sum(one.region != ORIGIN for one in calls)
                return Driven(cast(Body, value), tuple(calls), time.perf_counter() - began_s, crossings)
            case agent.ToolCalls(wanted, message):
                named = [(one, node.tools[one.tool]) for one in wanted]
                outputs = await asyncio.gather(*(call(tool.kind, tool.target, one.input) for one, tool in named))
                messages.append(message)
                for one, output in zip(wanted, outputs, strict=True):
                    messages.append({"role": "tool", "call": one.id, "tool": one.tool, "output": output})
            case agent.Nonsense(problem):
                raise AgentError(f"the model is not understood: {problem}")
    raise AgentError(f"no answer in {node.budget.iterations} iterations")


async def run(client: NearloopClient, question: str) -> Driven:
    """The loop as one run, wherever the gateway places it. Raises NearloopError."""
    began_s = time.perf_counter()
    names: dict[str, str] = {}
    calls: list[Told] = []
    items = client.run(PROGRAM, {"question": question}, timeout_s=RUN_TIMEOUT_S)
    summary, output = Summary("", ""), Body()
    async with aclosing(items):
        async for item in items:
            match item:
                case StepStarted():
                    names[item.key] = f"{item.kind} {item.target}"
                case StepEnded():
                    calls.append(Told(names.get(item.key, item.node), item.region, time.perf_counter() - began_s))
                case Summary():
                    summary = item
                case RunOutput():
                    output = cast(Body, item.output)
    wall_s = time.perf_counter() - began_s
    crossings = (summary.region != ORIGIN) + sum(call.region != summary.region for call in calls)
    return Driven(output, tuple(calls), wall_s, crossings, summary)

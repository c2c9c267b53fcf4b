"""Random programs give the same with guesses and without, in a world that some of their steps change."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program_strategies import TARGETS, programs
from run_guess_rig import Run, going

from gateway.errors import NearloopError, StepFailed
from gateway.program import expressions
from gateway.program.model import Block, Choose, Json, Loop, Map, Parallel, Program
from gateway.types import Completed as StepCompleted
from gateway.types import Kind, Payload, Status, Step, StepEvent, StepResult, Target, Timing


class World:
    """What targets see and change: `send` writes, the others tell how often it was written. Answers after some turns of the loop."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.sent = 0
        self.served = 0

    async def call(self, step: Step, again: bool, on_event: Callable[[StepEvent], None] | None = None) -> StepCompleted:
        self.served += 1
        for _ in range(self.random.randint(0, 6)):
            await asyncio.sleep(0)
        if step.target == "send":
            self.sent += 1
        elif hash_of(step) % 11 == 0:
            raise StepFailed("broken", code="INVALID_ARGUMENT", reason="BROKEN")
        output: Json = [None, 1, self.sent][hash_of(step) % 3]
        for _ in range(self.random.randint(0, 6)):
            await asyncio.sleep(0)
        return StepCompleted(StepResult(step.id, step.tenant, Status.DONE, Payload(json.dumps(output).encode())), Timing())

    async def abandon(self, step: Step) -> None: ...

    def target(self, kind: Kind, name: str) -> Target | None:
        return TARGETS.get(f"{kind.value}.{name}")


def hash_of(step: Step) -> int:
    return sum(step.input.data) + len(step.target)


def in_order(block: Block) -> Block:
    """The same without steps side by side, so that it is clear what each of them sees of the world."""
    made = []
    for node in block:
        if isinstance(node, Parallel):
            name, inner = next(iter(node.branches.items()))
            node = replace(node, branches={name: in_order(inner)})
        elif isinstance(node, Choose):
            node = replace(node, then=in_order(node.then), otherwise=in_order(node.otherwise))
        elif isinstance(node, Map):
            node = replace(node, body=in_order(node.body), at_once=1)
        elif isinstance(node, Loop):
            node = replace(node, body=in_order(node.body))
        made.append(node)
    return tuple(made)


async def outcome_of(what: Program, speculate: int, seed: int) -> tuple[str, int, int]:
    world = World(Random(seed))
    run = Run(what, world, given={"x": [1, 2]}, speculate=speculate, language=expressions)  # type: ignore[arg-type]
    async with going(run) as (task,):
        try:
            output = json.dumps(await task)
        except NearloopError as error:
            output = f"{error.reason}: {error.message}"
    guesses, wrong = run.work.summary
    return output, guesses, guesses - wrong


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(), st.integers(0, 1 << 30))
def test_a_run_gives_the_same_with_guesses_and_without(what: Program, seed: int) -> None:
    what = replace(what, steps=in_order(what.steps))
    plain, _, _ = asyncio.run(outcome_of(what, 0, seed))
    for speculate in (1, 4):
        assert asyncio.run(outcome_of(what, speculate, seed + speculate))[0] == plain


def test_random_programs_have_guesses_that_are_adopted() -> None:
    """A test of the test."""
    right = 0

    @settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def look(what: Program) -> None:
        nonlocal right
        right += asyncio.run(outcome_of(replace(what, steps=in_order(what.steps)), 4, 1))[2]

    look()
    assert right > 10

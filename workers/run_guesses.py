"""Calls of a run that are made before it is known that they are needed: guesses.

The engine says which calls may come (`gateway.program.lookahead`): they only read, and their inputs are known already. When the run then
asks for such a call, the guess is adopted: it is the call, whether it still runs or has its outcome. A guess that failed is forgotten, and
the call is made as if there had been none.

A guess is a step with an id of its own, attempt 0 of the call, and an idempotency key of its own. So nobody who asks for the call finds a
guess in its place, and the journal knows nothing of guesses: their outcomes are written when they are adopted, before anything goes on
from them, because another runner would not find them by the call's id. A runner that takes the run over makes the call again. That does
no harm, since it only reads.

Guesses are for room that is left over: there are none while steps of this runner wait for permits or are refused.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace

from gateway.errors import Rejected, StepFailed, Unavailable
from gateway.program.commands import StartCall
from gateway.program.engine import Engine
from gateway.program.journal import Completed
from gateway.program.lookahead import Ahead
from gateway.run_types import StepToken
from gateway.types import Completed as StepCompleted
from gateway.types import Kind, Step, StepEvent, Target
from workers.run_calls import CallService, Outcome, RunCalls

log = logging.getLogger("nearloop.runner")

MOST_IN_FLIGHT = 16  # of a runner
CALM_S = 2.0  # since a step last waited for a permit or was refused, before there are guesses again


class GuessBudget:
    """Shared by all runs of a runner. is_strained(): its calls compete for permits, so that a guess would take the place of one."""

    def __init__(self, is_strained: Callable[[], bool], most: int = MOST_IN_FLIGHT) -> None:
        self._is_strained = is_strained
        self._most = most
        self.in_flight = 0

    def room(self) -> int:
        return 0 if self._is_strained() else max(0, self._most - self.in_flight)


class GuessService:
    """The kernel as guesses see it: what is refused or cannot be sent now is not tried again."""

    def __init__(self, service: CallService) -> None:
        self._service = service

    async def call(self, step: Step, again: bool, on_event: Callable[[StepEvent], None] | None = None) -> StepCompleted:
        try:
            return await self._service.call(replace(step, idempotency_key=f"{step.idempotency_key}/guess"), again, on_event)
        except (Rejected, Unavailable) as error:
            raise StepFailed(error.message, code=error.code, reason=error.reason) from None

    async def abandon(self, step: Step) -> None:
        await self._service.abandon(step)

    def target(self, kind: Kind, name: str) -> Target | None:
        return self._service.target(kind, name)


class Guess:
    def __init__(self, ahead: Ahead) -> None:
        self.ahead = ahead
        self.task: asyncio.Task[Outcome | None]
        self.is_in_flight = True  # and counts in the budget
        self._tokens: list[StepToken] = []
        self._on_token: Callable[[StepToken], None] = self._tokens.append

    def token(self, token: StepToken) -> None:
        self._on_token(token)

    async def outcome(self, on_token: Callable[[StepToken], None] | None) -> Outcome | None:
        """Of an adopted guess, as that of the call; None when the call must be made. on_token: first gets what was streamed so far."""
        if on_token is not None:
            for token in self._tokens:
                on_token(token)
            self._on_token = on_token
        self._tokens.clear()
        found = await self.task
        if found is None:
            return None
        attempt = self.ahead.start.attempt
        return Outcome(replace(found.event, attempt=attempt), replace(found.told, attempt=attempt, speculated=True), stored=False)


class Guesses:
    """Of one run. `most`: at a time, whether they still run or wait to be adopted. `calls`: over a `GuessService`, and for nothing else.

    tokens: what models stream is wanted. again: another runner may have made the same guesses. made, wrong: how many there were, and how
    many of them the run did not need.
    """

    def __init__(
        self,
        most: int,
        engine: Engine,
        calls: RunCalls,
        service: CallService,
        budget: GuessBudget,
        *,
        tokens: bool = False,
        again: bool = False,
    ) -> None:
        self._most = most
        self._engine = engine
        self._calls = calls
        self._service = service
        self._budget = budget
        self._tokens = tokens
        self._again = again
        self._guesses: dict[str, Guess] = {}
        self._adopted: dict[str, Guess] = {}
        self._withdrawing: set[asyncio.Task[None]] = set()
        self.made = self.wrong = 0

    def look(self) -> None:
        """After each turn of the engine, when what it asked for has been adopted or begun."""
        for key, guess in [*self._guesses.items()]:
            if not self._engine.may_come(guess.ahead):
                self._drop(key, guess)
        room = min(self._most - len(self._guesses), self._budget.room())
        if room > 0:
            for ahead in self._engine.ahead(self._reads_only, room):
                self._begin(ahead)

    def adopt(self, start: StartCall) -> Guess | None:
        """The run asks for this call: its guess, when there is one that was right."""
        guess = self._guesses.get(start.key)
        if guess is None:
            return None
        if not _same(start, guess.ahead.start):
            self._drop(start.key, guess)
            return None
        del self._guesses[start.key]
        if not guess.task.done():
            self._adopted[start.key] = guess
        self._landed(guess)  # from now on it is a call like any other
        return guess

    async def abandon(self, key: str) -> None:
        """The adopted call is not needed any more."""
        guess = self._adopted.pop(key, None)
        if guess is not None:
            guess.task.cancel()
            await self._calls.abandon(key)

    def drop(self) -> None:
        """None is needed any more."""
        for key, guess in [*self._guesses.items()]:
            self._drop(key, guess)

    async def close(self) -> None:
        """Steps that were sent and not dropped are left to themselves: another runner has the run, or will have it."""
        for guess in self._guesses.values():
            self._landed(guess)
        tasks = [guess.task for guess in (*self._guesses.values(), *self._adopted.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._withdrawing, return_exceptions=True)
        self._guesses.clear()
        self._adopted.clear()

    def _reads_only(self, kind: Kind, name: str) -> bool:
        target = self._service.target(kind, name)
        return target is not None and target.read_only

    def _begin(self, ahead: Ahead) -> None:
        guess = self._guesses[ahead.start.key] = Guess(ahead)
        self._budget.in_flight += 1
        self.made += 1
        guess.task = asyncio.create_task(self._make(guess), name=f"guess {ahead.start.key}")

    async def _make(self, guess: Guess) -> Outcome | None:
        """None when it failed."""
        start = guess.ahead.start
        try:
            outcome = await self._calls.make(replace(start, attempt=0), self._again, guess.token if self._tokens else None)
        except Exception:
            log.exception("a guess of a run failed")
            outcome = None
        self._landed(guess)
        self._adopted.pop(start.key, None)
        if outcome is not None and isinstance(outcome.event, Completed):
            return outcome
        if self._guesses.get(start.key) is guess:
            del self._guesses[start.key]
        return None

    def _drop(self, key: str, guess: Guess) -> None:
        del self._guesses[key]
        self.wrong += 1
        self._landed(guess)
        if not guess.task.done():
            guess.task.cancel()
            task = asyncio.create_task(self._calls.abandon(key), name="withdraw a guess")
            self._withdrawing.add(task)
            task.add_done_callback(self._withdrawing.discard)

    def _landed(self, guess: Guess) -> None:
        if guess.is_in_flight:
            guess.is_in_flight = False
            self._budget.in_flight -= 1


def _same(start: StartCall, guessed: StartCall) -> bool:
    """By the text of the input: in Python 1, 1.0 and True are equal."""
    return replace(start, input=None) == replace(guessed, input=None) and json.dumps(start.input) == json.dumps(guessed.input)

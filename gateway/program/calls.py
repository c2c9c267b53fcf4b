"""The calls of a run: which wait for their turn, which run, which wait for another attempt."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any, Protocol

from gateway.program.commands import StartCall, Wait
from gateway.program.journal import Completed, Failed
from gateway.program.model import Retry

NO_RETRY = Retry()


class JournalMismatch(ValueError):
    """An outcome for a call that has not been asked for, or has had its outcome: a journal of something else, or a runner's mistake."""


class Asker(Protocol):
    """Who is told of a call's outcome."""

    def done(self, machine: Any, call: "Asked", outcome: Completed | Failed) -> None: ...


@dataclass(slots=True, order=True)
class Asked:
    """A call that a node wants. order: its place in the program, with indices of iterations; what is smaller is started first."""

    order: tuple[int, ...]
    start: StartCall = field(compare=False)
    asker: Asker = field(compare=False)
    retry: Retry = field(compare=False, default=NO_RETRY)
    slot: int = field(compare=False, default=0)  # for the asker, to know which of its calls this is


class Calls:
    """At most `at_once` run. A call that waits for another attempt keeps its place among them."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._queue: list[Asked] = []
        self._running: dict[str, Asked] = {}
        self._retries: dict[str, Wait] = {}  # of calls in _running

    def add(self, call: Asked) -> None:
        heappush(self._queue, call)

    def start_next(self) -> Iterator[StartCall]:
        """Takes calls out of the queue, in program order, as long as more may run."""
        while self._queue and len(self._running) < self._at_once:
            call = heappop(self._queue)
            self._running[call.start.key] = call
            yield call.start

    def find(self, outcome: Completed | Failed) -> Asked:
        """The call that this is the outcome of. Raises JournalMismatch."""
        call = self._running.get(outcome.key)
        if call is None or call.start.attempt != outcome.attempt:
            raise JournalMismatch(f"attempt {outcome.attempt} of {outcome.key} is not under way")
        return call

    def end(self, call: Asked) -> None:
        del self._running[call.start.key]
        self._retries.pop(call.start.key, None)

    def try_again(self, call: Asked) -> Wait:
        """Prepares the next attempt, for after the wait of first_s * factor ** (attempts made - 1), at most most_s."""
        retry, made = call.retry, call.start.attempt
        try:
            delay_s = min(retry.most_s, retry.first_s * retry.factor ** (made - 1))
        except OverflowError:
            delay_s = retry.most_s
        call.start = replace(call.start, attempt=made + 1)
        wait = self._retries[call.start.key] = Wait(call.start.key, delay_s, is_retry=True)
        return wait

    def fired(self, key: str) -> StartCall | None:
        """The attempt to start now; None when none waits."""
        return self._running[key].start if self._retries.pop(key, None) else None

    def under_way(self) -> list[StartCall | Wait]:
        """What has been asked of the runner and has no outcome."""
        return [self._retries.get(key, call.start) for key, call in self._running.items()]

    def running(self) -> list[str]:
        return list(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def is_queued(self, key: str) -> bool:
        return any(call.start.key == key for call in self._queue)

    def clear(self) -> None:
        self._queue.clear()
        self._running.clear()
        self._retries.clear()

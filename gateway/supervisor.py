"""Several supervised processes: started in the order of their dependencies, stopped in the reverse one, never orphaned."""

import asyncio
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gateway.guard import Guard
from gateway.supervised import Part, PartFailed, Supervised

__all__ = ["Part", "PartFailed", "Supervisor", "interrupts"]

_TRIM_EVERY_S = 5.0


class Supervisor:
    """Parts come in an order in which each `after` and `uses` names earlier parts only.

    on_line gets one line of text for everything that a person should see. Each part's output goes to `log_dir/<name>.log`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        log_dir: Path,
        guard: Guard,
        on_line: Callable[[str], None],
        rng: random.Random | None = None,
    ) -> None:
        self._parts: dict[str, Part] = {}
        for part in parts:
            missing = [name for name in (*part.after, *part.uses) if name not in self._parts]
            if part.name in self._parts or missing:
                raise ValueError(f"part {part.name} is there twice or names parts that do not come before it: {missing}")
            self._parts[part.name] = part
        rng = rng or random.Random()
        self._all = {name: Supervised(part, log_dir / f"{name}.log", guard, on_line, rng) for name, part in self._parts.items()}
        self._trimming: asyncio.Task[None] | None = None

    def part(self, name: str) -> Supervised:
        """Raises KeyError for a name that is no part."""
        return self._all[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._all)

    async def start(self) -> None:
        """Starts everything and returns when all is ready. Raises PartFailed when a part does not get ready; call stop() then."""
        for one in self._all.values():
            one.start([self._all[name] for name in one.part.after])
        self._trimming = asyncio.create_task(self._trim())
        firsts = [one.first_ready for one in self._all.values()]
        done, _ = await asyncio.wait(firsts, return_when=asyncio.FIRST_EXCEPTION)
        for first in done:
            first.result()

    async def stop(self) -> None:
        """Stops each part after those that need it; parts that do not need each other stop at the same time."""
        if self._trimming is not None:
            self._trimming.cancel()
        stopping: dict[str, asyncio.Task[None]] = {}
        for name in reversed(self._all):
            users = [task for other, task in stopping.items() if name in (*self._parts[other].after, *self._parts[other].uses)]
            stopping[name] = asyncio.create_task(self._stop_after(users, self._all[name]))
        try:
            if stopping:
                await asyncio.shield(asyncio.gather(*stopping.values()))
        except asyncio.CancelledError:  # whoever waits has no patience left
            self.kill_now()
            await asyncio.gather(*stopping.values())
            raise

    def kill_now(self) -> None:
        """SIGKILL for everything at once; a stop() under way then ends at once as well."""
        for one in self._all.values():
            one.kill_now()

    async def _stop_after(self, users: Sequence[asyncio.Task[None]], one: Supervised) -> None:
        if users:
            await asyncio.wait(users)
        await one.stop()

    async def _trim(self) -> None:
        while True:
            await asyncio.sleep(_TRIM_EVERY_S)
            for one in self._all.values():
                one.log.trim()


@contextmanager
def interrupts(kill_now: Callable[[], None]) -> Iterator[asyncio.Event]:
    """The event is set at the first Ctrl-C or SIGTERM; each further one calls kill_now."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            kill_now()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

"""One supervised process: started, waited for until it is ready, started again when it dies, stopped without a trace."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from gateway.guard import Guard, kill_group
from gateway.part_log import PartLog

_PROBE_EVERY_S = (0.03, 0.25)  # first and longest pause between two readiness probes
_PROBE_TIMEOUT_S = 3.0
_ASK_EVERY_S = 1.0  # how often a running part is asked what ails it
_BACKOFF_S = (0.2, 10.0)  # first and longest pause before a restart, halved at most by jitter
_GROUP_GONE_PROBES = 200  # 10 ms apart
_STABLE_S = 20.0  # a part that ran as long starts again at the first pause


class PartFailed(Exception):
    """A part could not be started; the text is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Part:
    """A process to supervise.

    probe answers whether it is ready; exceptions count as no. after: parts that must be ready before each start. uses: parts that
    it needs while it runs, so it is stopped before them. explain turns the end of its log into a sentence, or empty.
    ailment, asked with the process id when the part is ready and about once a second from then on, says why the process does its work
    no longer though it runs; empty when it does. A part that ails is killed and started again. It must neither block nor raise.
    clean_up is called whenever the process and its whole group are gone. env None inherits the supervisor's environment.
    """

    name: str
    argv: tuple[str, ...]
    probe: Callable[[], Awaitable[bool]]
    address: str = ""
    env: Mapping[str, str] | None = None
    after: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    explain: Callable[[str], str] | None = None
    ailment: Callable[[int], str] | None = None
    before_start: Callable[[], None] | None = None
    clean_up: Callable[[], None] | None = None
    ready_timeout_s: float = 60.0
    stop_grace_s: float = 10.0


class Supervised:
    """A part's life. `run` never returns; `stop` ends it. All times are of the event loop's clock."""

    def __init__(self, part: Part, log_path: Path, guard: Guard, on_line: Callable[[str], None], rng: Random) -> None:
        self.part = part
        self.log = PartLog(log_path)
        self.ready = asyncio.Event()
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.restarts = 0
        self._guard = guard
        self._on_line = on_line
        self._rng = rng
        self._process: asyncio.subprocess.Process | None = None
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Of the running process, 0 when there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    def start(self, after: Sequence["Supervised"]) -> None:
        self._task = asyncio.create_task(self._run(after), name=f"supervise {self.part.name}")
        self._task.add_done_callback(self._over)

    async def stop(self) -> None:
        """SIGTERM, SIGKILL after the grace, and the rest of the process group with it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if not self.first_ready.cancel() and not self.first_ready.cancelled():
            self.first_ready.exception()  # start() may have raised another part's
        self.ready.clear()
        process = self._process
        if process is None:
            return
        try:
            if process.returncode is None:
                process.terminate()
                async with asyncio.timeout(self.part.stop_grace_s):
                    await process.wait()
        except TimeoutError:
            self._on_line(f"{self.part.name}: did not stop within {self.part.stop_grace_s:g} s and was killed")
        finally:
            self.kill_now()
            await process.wait()
            await self._gone(process)

    def kill_now(self) -> None:
        """SIGKILL for the process and all that it started."""
        if self._process is not None:
            kill_group(self._process.pid)

    async def kill(self) -> None:
        """SIGKILL as from outside; returns when the end was noticed. The part is then started again."""
        self._ended.clear()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            await self._ended.wait()

    async def _run(self, after: Sequence["Supervised"]) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            for other in after:
                await other.ready.wait()
            started_s = loop.time()
            reason = await self._live()
            if not self.first_ready.done():
                self.first_ready.set_exception(PartFailed(reason))
                return
            failures = 0 if loop.time() - started_s > _STABLE_S else failures + 1
            pause_s = min(_BACKOFF_S[1], _BACKOFF_S[0] * 2.0 ** max(0, failures - 1)) * self._rng.uniform(0.5, 1.0)
            self._on_line(f"{reason}; starting it again in {pause_s:.1f} s")
            self.restarts += 1
            await asyncio.sleep(pause_s)

    def _over(self, task: asyncio.Task[None]) -> None:
        """A mistake in the part's own functions must not leave start() waiting."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.first_ready.done():
            self.first_ready.set_exception(error)

    async def _live(self) -> str:
        """One life, from start to end; returns the sentence that says how it ended."""
        started_s = asyncio.get_running_loop().time()
        try:
            process = await self._spawn()
        except OSError as error:
            return f"{self.part.name}: {self.part.argv[0]} cannot be started: {error.strerror}"
        ready = await self._until_ready(process)
        too_slow = not ready and process.returncode is None
        ailment = ""
        if ready:
            self._announce(asyncio.get_running_loop().time() - started_s)
            ailment = await self._until_ailing(process)
        if too_slow or ailment:
            kill_group(process.pid)
        await process.wait()
        await self._gone(process)
        return f"{self.part.name} was killed: {ailment}" if ailment else self._reason(process, too_slow)

    async def _spawn(self) -> asyncio.subprocess.Process:
        if self.part.before_start is not None:
            self.part.before_start()
        output = self.log.open()
        try:
            start = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    *self.part.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=None if self.part.env is None else dict(self.part.env),
                    start_new_session=True,  # a group of its own, which Ctrl-C in the terminal does not reach
                )
            )
            try:
                self._process = await asyncio.shield(start)
            except asyncio.CancelledError:  # stopped at this very moment: stop() must still learn of the process
                self._process = await start
                raise
        finally:
            os.close(output)
            if self._process is not None:
                self._guard.watch(self._process.pid)
        return self._process

    async def _until_ready(self, process: asyncio.subprocess.Process) -> bool:
        """False when the process ended first, or was not ready in time."""
        probing = asyncio.create_task(self._probe())
        ending = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({probing, ending}, timeout=self.part.ready_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            return probing.done() and process.returncode is None
        finally:
            probing.cancel()
            ending.cancel()
            await asyncio.wait({probing, ending})

    async def _until_ailing(self, process: asyncio.subprocess.Process) -> str:
        """What ails it; empty when the process ended by itself."""
        if self.part.ailment is None:
            await process.wait()
            return ""
        ending = asyncio.create_task(process.wait())
        try:
            while process.returncode is None:
                if ailment := self.part.ailment(process.pid):
                    return ailment
                await asyncio.wait({ending}, timeout=_ASK_EVERY_S)
            return ""
        finally:
            ending.cancel()
            await asyncio.wait({ending})

    async def _probe(self) -> None:
        pause_s, longest_s = _PROBE_EVERY_S
        while True:
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    if await self.part.probe():
                        return
            except Exception:  # noqa: S110  whatever a probe raises means: not ready yet
                pass
            await asyncio.sleep(pause_s)
            pause_s = min(longest_s, pause_s * 1.5)

    def _announce(self, took_s: float) -> None:
        self.ready.set()
        if self.first_ready.done():
            self._on_line(f"{self.part.name}: ready again after {took_s:.1f} s, pid {self.pid}")
        else:
            self.first_ready.set_result(None)
            self._on_line(f"{self.part.name:<18} {self.part.address:<32} ready in {took_s:.1f} s, pid {self.pid}")

    def _reason(self, process: asyncio.subprocess.Process, too_slow: bool) -> str:
        code = process.returncode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if too_slow:
            how = f"was not ready within {self.part.ready_timeout_s:g} s"
        explained = self.part.explain(self.log.tail()) if self.part.explain is not None else ""
        last = explained or self.log.last_line()
        return f"{self.part.name} {how}{': ' + last if last else ''}"

    async def _gone(self, process: asyncio.subprocess.Process) -> None:
        """The process has ended: ends what it started and left behind, such as Triton's stubs, and cleans up after them."""
        self.ready.clear()
        for _ in range(_GROUP_GONE_PROBES):
            if not kill_group(process.pid):
                break
            await asyncio.sleep(0.01)
        self._guard.forget(process.pid)
        if self.part.clean_up is not None:
            self.part.clean_up()
        self._process = None
        self._ended.set()

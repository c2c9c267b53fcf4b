"""Real processes: ready, crash, restart, stop in order, no orphan."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import psutil
import pytest

from gateway.guard import Guard
from gateway.part_log import PartLog
from gateway.supervisor import Part, PartFailed, Supervisor

# A child that says that it is ready by making a file, notes its end, and waits.
CHILD = """
import pathlib, signal, subprocess, sys
ready, notes, words = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
def end(*_):
    with notes.open("a") as file:
        file.write(ready.name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in words else end)
if "parent" in words:
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"])
    ready.with_suffix(".child").write_text(str(child.pid))
if "crash" in words:
    print("reading the settings", flush=True)
    sys.exit("no such model: 'plan'")
ready.with_suffix(".tmp").write_text("")
ready.with_suffix(".tmp").rename(ready)
while True:
    signal.pause()
"""


class Lines(list[str]):
    """The supervisor's lines; `said` waits for one with a word."""

    def __init__(self) -> None:
        self._more = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.append(line)
        self._more.set()

    async def said(self, word: str) -> str:
        while True:
            for line in self:
                if word in line:
                    return line
            self._more.clear()
            await self._more.wait()


Make = Callable[..., Part]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def child(name: str, *words: str, after: tuple[str, ...] = (), uses: tuple[str, ...] = (), **settings: object) -> Part:
        ready = tmp_path / name

        async def probe() -> bool:
            return os.path.exists(ready)

        return Part(
            name=name,
            argv=(sys.executable, "-I", "-S", "-c", CHILD, str(ready), str(tmp_path / "notes"), *words),
            probe=probe,
            after=after,
            uses=uses,
            before_start=lambda: ready.unlink(missing_ok=True),
            **settings,  # type: ignore[arg-type]
        )

    return child


@asynccontextmanager
async def running(tmp_path: Path, *parts: Part) -> AsyncIterator[tuple[Supervisor, Lines]]:
    guard, lines = Guard(), Lines()
    supervisor = Supervisor(parts, tmp_path, guard, lines, Random(1))
    try:
        await supervisor.start()
        yield supervisor, lines
    finally:
        await supervisor.stop()
        guard.close()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_starts_what_it_depends_on_first_and_stops_it_last(tmp_path: Path, make: Make) -> None:
    parts = (
        make("broker"),
        make("tool"),
        make("worker", after=("broker",), uses=("tool",)),
        make("front", after=("broker",), uses=("worker",)),
    )
    async with running(tmp_path, *parts) as (supervisor, lines):
        pids = [supervisor.part(name).pid for name in supervisor.names]
        assert all(alive(pid) for pid in pids)
        said = [line.split()[0] for line in lines]
        assert sorted(said) == ["broker", "front", "tool", "worker"]
        assert said.index("broker") < min(said.index("worker"), said.index("front"))
        assert all(f"pid {supervisor.part(line.split()[0]).pid}" in line and "ready in" in line for line in lines)
    assert not any(alive(pid) for pid in pids)
    order = (tmp_path / "notes").read_text().split()
    assert order[:2] == ["front", "worker"]
    assert sorted(order[2:]) == ["broker", "tool"]


async def test_a_part_that_dies_is_started_again_with_the_reason(tmp_path: Path, make: Make) -> None:
    async with running(tmp_path, make("worker", "parent")) as (supervisor, lines):
        first = supervisor.part("worker").pid
        grandchild = int((tmp_path / "worker.child").read_text())
        await supervisor.part("worker").kill()
        assert not alive(first)
        assert not alive(grandchild), "what the part had started goes with it"
        await supervisor.part("worker").ready.wait()
        assert supervisor.part("worker").pid not in (0, first)
        assert supervisor.part("worker").restarts == 1
        assert "was killed by SIGKILL; starting it again in" in await lines.said("SIGKILL")
        assert "ready again" in await lines.said("ready again")


async def test_a_part_that_ends_by_itself_is_started_again(tmp_path: Path, make: Make) -> None:
    async with running(tmp_path, make("worker")) as (supervisor, lines):
        os.kill(supervisor.part("worker").pid, signal.SIGTERM)
        assert "ended with exit code 0" in await lines.said("exit code")
        await lines.said("ready again")


async def test_a_part_that_ails_is_killed_and_started_again(tmp_path: Path, make: Make) -> None:
    asked: list[int] = []

    def ailment(pid: int) -> str:
        asked.append(pid)
        return "its helper has died" if pid == asked[0] and len(asked) > 1 else ""

    async with running(tmp_path, make("worker", "stubborn", ailment=ailment)) as (supervisor, lines):
        first = supervisor.part("worker").pid
        assert "worker was killed: its helper has died; starting it again in" in await lines.said("killed")
        await lines.said("ready again")
        assert not alive(first)
        assert asked[:2] == [first, first]
        assert first not in asked[2:]
        assert supervisor.part("worker").pid not in (0, first)
        assert supervisor.part("worker").restarts == 1


async def test_a_part_that_is_well_may_still_die(tmp_path: Path, make: Make) -> None:
    asked: list[int] = []

    def ailment(pid: int) -> str:
        asked.append(pid)
        return ""

    async with running(tmp_path, make("worker", ailment=ailment)) as (supervisor, lines):
        first = supervisor.part("worker").pid
        await supervisor.part("worker").kill()
        assert "was killed by SIGKILL; starting it again in" in await lines.said("SIGKILL")
        await lines.said("ready again")
        assert list(dict.fromkeys(asked)) == [first, supervisor.part("worker").pid]


async def test_a_part_that_crashes_at_the_first_start_ends_everything(tmp_path: Path, make: Make) -> None:
    with pytest.raises(PartFailed, match=r"^worker ended with exit code 1: no such model: 'plan'$"):
        async with running(tmp_path, make("broker"), make("worker", "crash")):
            pytest.fail("it must not be called ready")
    assert not any("test_a_part_that_crashes" in " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True))


async def test_explain_turns_the_log_into_a_sentence(tmp_path: Path, make: Make) -> None:
    seen: list[str] = []

    def explain(log: str) -> str:
        seen.append(log)
        return "a model is missing: add it"

    with pytest.raises(PartFailed, match=r"a model is missing: add it$"):
        async with running(tmp_path, make("worker", "crash", explain=explain)):
            pytest.fail("it must not be called ready")
    assert seen == ["reading the settings\nno such model: 'plan'\n"]


async def test_a_part_that_is_never_ready_is_given_up(tmp_path: Path, make: Make) -> None:
    async def never() -> bool:
        raise ConnectionRefusedError

    part = Part("mute", make("mute", "stubborn").argv, probe=never, ready_timeout_s=0.3)
    with pytest.raises(PartFailed, match=r"^mute was not ready within 0.3 s"):
        async with running(tmp_path, part):
            pytest.fail("it must not be called ready")


async def test_a_missing_executable_is_one_sentence(tmp_path: Path, make: Make) -> None:
    part = Part("gone", (str(tmp_path / "nothing"),), probe=make("gone").probe)
    with pytest.raises(PartFailed, match=r"^gone: .*/nothing cannot be started: No such file or directory$"):
        async with running(tmp_path, part):
            pytest.fail("it must not be called ready")


async def test_a_part_that_does_not_stop_is_killed(tmp_path: Path, make: Make) -> None:
    async with running(tmp_path, make("deaf", "stubborn", stop_grace_s=0.2)) as (supervisor, lines):
        pid = supervisor.part("deaf").pid
    assert not alive(pid)
    assert lines[-1] == "deaf: did not stop within 0.2 s and was killed"


async def test_kill_now_cuts_a_stop_short(tmp_path: Path, make: Make) -> None:
    async with running(tmp_path, make("deaf", "stubborn", stop_grace_s=3600.0)) as (supervisor, _):
        pid = supervisor.part("deaf").pid
        stopping = asyncio.create_task(supervisor.stop())
        supervisor.kill_now()
        await stopping
        assert not alive(pid)


async def test_a_cancelled_stop_still_stops(tmp_path: Path, make: Make) -> None:
    async with running(tmp_path, make("deaf", "stubborn", stop_grace_s=3600.0)) as (supervisor, _):
        pid = supervisor.part("deaf").pid
        stopping = asyncio.create_task(supervisor.stop())
        asyncio.get_running_loop().call_soon(stopping.cancel)
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert not alive(pid)


async def test_clean_up_is_called_after_each_life(tmp_path: Path, make: Make) -> None:
    seen: list[bool] = []
    pids: list[int] = []
    part = make("triton", "parent", clean_up=lambda: seen.append(any(alive(pid) for pid in pids)))
    async with running(tmp_path, part) as (supervisor, _):
        pids += [supervisor.part("triton").pid, int((tmp_path / "triton.child").read_text())]
        await supervisor.part("triton").kill()
        await supervisor.part("triton").ready.wait()
    assert seen == [False, False]


def test_parts_name_earlier_parts_only(tmp_path: Path, make: Make) -> None:
    guard = Guard()
    try:
        with pytest.raises(ValueError, match="broker"):
            Supervisor([make("worker", after=("broker",)), make("broker")], tmp_path, guard, print)
    finally:
        guard.close()


OWNER = """
import asyncio, pathlib, sys
from random import Random
from gateway.guard import Guard
from gateway.supervisor import Part, Supervisor

async def main():
    folder = pathlib.Path(sys.argv[1])
    guard = Guard()
    guard.remove(folder / "state")
    async def probe():
        return (folder / "child").exists()
    argv = (sys.executable, "-I", "-S", "-c", sys.argv[2], str(folder / "child"), str(folder / "notes"), "parent", "stubborn")
    supervisor = Supervisor([Part("child", argv, probe)], folder / "state", guard, lambda line: None, Random(1))
    await supervisor.start()
    print(supervisor.part("child").pid, (folder / "child.child").read_text(), guard.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    argv = [sys.executable, "-P", "-c", OWNER, str(tmp_path), CHILD]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child, grandchild, guard = (int(pid) for pid in owner.stdout.readline().split())
        guard_fd = os.pidfd_open(guard)
        owner.kill()
    select.select([guard_fd], [], [], 30)  # readable when the guard has done its work and ended
    os.close(guard_fd)
    assert not any(alive(pid) for pid in (guard, child, grandchild))
    assert not (tmp_path / "state").exists()


def test_a_log_is_cut_to_its_end(tmp_path: Path) -> None:
    log = PartLog(tmp_path / "part.log", max_bytes=1000)
    descriptor = log.open()
    try:
        for number in range(200):
            os.write(descriptor, f"line {number}\n".encode())
        log.trim()
        assert log.path.stat().st_size <= 500
        os.write(descriptor, b"\nafter\n\n")
        assert log.last_line() == "after"
        assert "line 199\n" in log.tail()
        assert log.path.read_text().startswith("line 1")
    finally:
        os.close(descriptor)


def test_a_tail_starts_with_the_present_life(tmp_path: Path) -> None:
    log = PartLog(tmp_path / "part.log")
    for word in ("old", "new"):
        descriptor = log.open()
        os.write(descriptor, f"{word}\n".encode())
        os.close(descriptor)
    assert log.tail() == "new\n"
    assert log.path.read_text() == "old\nnew\n"

"""What to do after a Triton, or a model's process in it, has ended: notice it, say why, and clear away what is left behind."""

import os
import re
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STUB = "triton_python_backend_stub"
_SHM_DIR = Path("/dev/shm")  # where POSIX shared memory lives on Linux
_LONGEST_REASON = 300
_COMM = STUB[:15]  # what the kernel keeps of a process's name, also for a zombie
_TRY_EVERY_S = (1.0, 30.0)  # first and longest pause before a step tries a model that has lost its process


def explain_failure(log_text: str) -> str:
    """Why the server whose output this is did not start, in one line that says what to do."""
    if match := re.search(r"Socket '([^']*):(\d+)' already in use", log_text):
        address, port = match.groups()
        return f"Triton could not start: port {port} on {address} is in use; stop what listens there or choose another port"
    if match := re.search(r"failed to load '([^']+)' version \d+: (.*)", log_text):
        return _model_failure(match.group(1), match.group(2))
    if match := re.search(r"Poll failed for model directory '([^']+)': (.*)", log_text):
        detail = re.search(r"Error parsing text-format [\w.]+: (.*)", log_text)
        return _model_failure(match.group(1), detail.group(1) if detail else match.group(2))
    if match := re.search(r"failed to load model '([^']+)': (.*)", log_text):
        return _model_failure(match.group(1), match.group(2))
    if match := re.search(r"error while loading shared libraries: ([^:\s]+):", log_text):
        return f"Triton could not start: the shared library {match.group(1)} was not found; install it or reinstall the wheel"
    errors = re.findall(r'^(?:E\d{4} .*?\] "?|error: )(.*)$', log_text, re.MULTILINE)
    # Said on every machine without a GPU, and no fault.
    errors = [text for text in errors if "CudaDriverHelper" not in text]
    if errors:
        return f"Triton could not start: {_first_line(errors[-1])}; its log has more"
    return "Triton ended without saying why; its log may have more"


def _model_failure(model: str, reason: str) -> str:
    if "No space left" in reason or "shared memory" in reason:
        return (
            f"Triton could not load the model '{model}': too little shared memory ({_first_line(reason)}); free /dev/shm or make it larger"
        )
    return f"Triton could not load the model '{model}': {_first_line(reason)}; correct the model or take it out of the repository"


def _first_line(reason: str) -> str:
    """Without the traceback, which Triton logs with escaped line ends, and without its error class."""
    text = re.split(r"\\n|\n", reason.strip())[0].strip().removeprefix('"').rstrip(".")
    return re.sub(r"^(?:Internal|Invalid argument): ", "", text)[:_LONGEST_REASON]


def remove_shared_memory(prefix: str) -> int:
    """Remove the shared memory that a killed Triton of this prefix left behind; returns how many regions that were.

    Call it only when that server and its stubs are gone. Raises ValueError for an empty prefix.
    """
    if not prefix:
        raise ValueError("an empty prefix would remove the shared memory of every program")
    removed = 0
    for region in _SHM_DIR.iterdir() if _SHM_DIR.is_dir() else ():
        if region.name.startswith((prefix, f"sem.{prefix}")) and region.is_file():
            region.unlink(missing_ok=True)
            removed += 1
    return removed


def end_stubs(prefix: str) -> int:
    """Kill the model processes of this prefix whose server is dead, wait until they are gone, return their number.

    A stub ends by itself when its server dies, except while a model waits for the server's answer (for example to
    `is_cancelled`): that one stays for ever. Stubs of a server that lives are left alone.
    """
    ended = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            descriptor = os.pidfd_open(int(folder.name))
        except OSError:
            continue
        try:
            # stub, model.py, shared memory name, its size, its growth, the server's process id, ...
            argv = (folder / "cmdline").read_bytes().split(b"\0")
            if len(argv) < 6 or not argv[0].endswith(STUB.encode()) or not argv[2].startswith(prefix.encode()):
                continue
            if _is_alive(int(argv[5])):
                continue
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], 5.0)  # readable when the process has ended
            ended += 1
        except OSError:
            continue  # gone by itself in between
        finally:
            os.close(descriptor)
    return ended


def _is_alive(pid: int) -> bool:
    return _state(pid) not in ("", "Z", "X")


def _state(pid: int) -> str:
    """One letter; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class StubWatch:
    """Notices model processes that died under a server that lives.

    Triton 2.51 starts no other one, calls server and model ready as before, fails each later request after a second and leaves those
    that were in work without an answer; only a new server helps.
    """

    def __init__(self) -> None:
        self._server = 0
        self._stubs: dict[int, str] = {}  # process id: instance, such as echo_0_0
        self._dead: set[int] = set()  # at the last look

    def ailment(self, server: int) -> str:
        """What is wrong with the server of this process id, empty when nothing is.

        Asked about once a second; a stub counts as dead when two looks in a row find it so, since a server that ends by itself
        loses its stubs a moment before.
        """
        if server != self._server:
            self._server, self._stubs, self._dead = server, {}, set()
        for pid in _children(server):
            if pid not in self._stubs and (instance := _instance(pid)):
                self._stubs[pid] = instance
        dead = {pid for pid in self._stubs if not _is_alive(pid)}
        for_good, self._dead = dead & self._dead, dead
        if not for_good:
            return ""
        return f"the process of model instance {', '.join(sorted(self._stubs[pid] for pid in for_good))} has died"


def _children(pid: int) -> list[int]:
    """Of all its threads: whichever started a process is its parent."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue  # the thread has ended
    return found


def _instance(pid: int) -> str:
    """The model instance whose stub this process is; empty for another process."""
    try:
        if Path(f"/proc/{pid}/comm").read_text().strip() != _COMM:
            return ""
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return argv[8].decode(errors="replace") if len(argv) > 8 else f"with process id {pid}"  # a zombie has no arguments


class LostProcess:
    """A model that has lost its process in a server that is not ours to start again: when may a step try it?

    The pause doubles with each step that tried in vain, with jitter, so that many workers do not try at once. Times in seconds.
    """

    __slots__ = ("_not_before_s", "_pause_s", "_trying")

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._not_before_s = 0.0
        self._trying = False

    def may_try(self, now_s: float) -> bool:
        return not self._trying and now_s >= self._not_before_s

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Meanwhile nobody else may."""
        self._trying = True
        try:
            yield
        finally:
            self._trying = False

    def failed(self, now_s: float, random: float) -> None:
        """A step found no process. Steps that were sent before the first of them failed change nothing."""
        if self._pause_s and not self._trying:
            return
        first_s, longest_s = _TRY_EVERY_S
        self._pause_s = min(max(first_s, self._pause_s * 2.0), longest_s)
        self._not_before_s = now_s + self._pause_s * (0.75 + random / 4)

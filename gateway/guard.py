"""Nothing is left behind, even when the supervisor itself is killed with SIGKILL.

`Guard` starts this file as a tiny process of its own session that reads notes from a pipe. The pipe ends when the supervisor
does, however that happens; the guard then kills the process groups that are still noted and removes the noted directories
and shared memory. Standard library only and run by path, so that it costs about 20 ms and 8 MB.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

_SHM_DIR = Path("/dev/shm")
_GONE_WITHIN_S = 3.0


class Guard:
    """The supervisor's end of the pipe. A guard that died is not an error: it only insures against what should not happen."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal must not reach it
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, group: int) -> None:
        """Kill this process group at the end."""
        self._note(watch=group)

    def forget(self, group: int) -> None:
        """The group is gone, its number may be used again by others."""
        self._note(forget=group)

    def remove(self, path: Path) -> None:
        """Remove this directory at the end."""
        self._note(remove=str(path))

    def remove_shared_memory(self, prefix: str) -> None:
        """Remove the shared memory whose name starts so at the end."""
        self._note(shm=prefix)

    def close(self) -> None:
        """Ends the guard, which does what is still noted; returns when that is done."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        self._process.wait()

    def _note(self, **note: int | str) -> None:
        if self._process.stdin is not None:
            try:
                self._process.stdin.write(json.dumps(note).encode() + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass


def kill_group(group: int) -> bool:
    """SIGKILL for every process of the group; False when none of it runs any more."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    # Dead processes belong to the group until init has reaped them, which takes some inits seconds.
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # gone in between
        if int(process_group) == group and state not in "ZX":
            return True
    return False


def clean_up(groups: Iterable[int], directories: Iterable[str], prefixes: Iterable[str]) -> None:
    """Kills the groups, waits until they are gone, then removes directories and shared memory."""
    give_up = time.monotonic() + _GONE_WITHIN_S
    left = [group for group in groups if kill_group(group)]
    while left and time.monotonic() < give_up:
        time.sleep(0.02)
        left = [group for group in left if kill_group(group)]
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
    for prefix in filter(None, prefixes):
        for region in [*_SHM_DIR.glob(f"{prefix}*"), *_SHM_DIR.glob(f"sem.{prefix}*")]:
            region.unlink(missing_ok=True)


def main() -> None:
    groups: set[int] = set()
    directories: list[str] = []
    prefixes: list[str] = []
    for line in sys.stdin:
        note = json.loads(line)
        if "watch" in note:
            groups.add(note["watch"])
        elif "forget" in note:
            groups.discard(note["forget"])
        elif "remove" in note:
            directories.append(note["remove"])
        elif "shm" in note:
            prefixes.append(note["shm"])
    clean_up(groups, directories, prefixes)


if __name__ == "__main__":
    main()

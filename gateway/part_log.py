"""A part's log file: appended by the part itself, kept small by the supervisor, read for the reason why it ended."""

import os
from pathlib import Path

MAX_BYTES = 8 * 1024 * 1024
_KEEP_BYTES = 1024 * 1024
_TAIL_BYTES = 16 * 1024
_MAX_LINE_CHARS = 240


class PartLog:
    """The part writes to the file directly (O_APPEND), so it never waits for the supervisor and outlives it without SIGPIPE."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._start = 0

    def open(self) -> int:
        """A descriptor for the part's output; what comes from now on is what `tail` returns. The caller closes it."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._start = os.fstat(descriptor).st_size
        return descriptor

    def trim(self) -> None:
        """Cuts the file to its end when it has grown too large. Lines written at that very moment may be lost."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return
        if size <= self._max_bytes:
            return
        with self.path.open("r+b") as file:
            file.seek(size - min(_KEEP_BYTES, self._max_bytes // 2))
            file.readline()  # a piece of a line
            end = file.read()
            file.truncate(0)
        with self.path.open("ab") as file:
            file.write(end)
        self._start = 0

    def tail(self) -> str:
        """The last 16 KiB of what was written since the file was opened last."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _TAIL_BYTES, self._start if self._start <= size else 0))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def last_line(self) -> str:
        """The last line that says something, shortened to 240 characters."""
        lines = [line.strip() for line in self.tail().splitlines() if line.strip()]
        return lines[-1][:_MAX_LINE_CHARS] if lines else ""

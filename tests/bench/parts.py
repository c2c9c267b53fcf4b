"""The processes of a run: each in a session of its own, so that Ctrl-C reaches only the benchmark, which stops them all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from gateway.addresses import free_port

ROOT = Path(__file__).parents[2]
STOP_TIMEOUT_S = 10.0


class BenchError(Exception):
    """One line that says what could not be measured, and why."""


@dataclass(frozen=True)
class Part:
    """A running process; name is its role (gateway, worker, nats-server, ...)."""

    name: str
    process: "subprocess.Popen[str]"
    log: Path

    def cpu_s(self) -> float:
        """Processor time so far, children included; those that have ended are not."""
        total = 0.0
        try:
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            pass
        return total

    def check(self) -> None:
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-15:]
            raise BenchError(f"{self.name} ended with {self.process.returncode}; its last words:\n    " + "\n    ".join(tail))


class Parts:
    """Starts processes and, on exit, stops them in reverse order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.after_stop: list[Callable[[], object]] = []
        self._parts: list[Part] = []

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for part in reversed(self._parts):
            _stop(part)
        for clean_up in self.after_stop:
            clean_up()

    def start(self, name: str, argv: list[str], env: dict[str, str] | None = None) -> Part:
        log = self.folder / f"{len(self._parts)}-{name}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if name == "client" else sink,
                stderr=sink,
                text=True,
                start_new_session=True,
            )
        part = Part(name, process, log)
        self._parts.append(part)
        return part

    def start_module(self, name: str, module: str, *arguments: str) -> Part:
        return self.start(name, [sys.executable, "-m", module, *arguments])

    def start_nats_server(self) -> tuple[Part, str]:
        """A nats-server with JetStream on files; returns it and its URL."""
        port = free_port()
        store = self.folder / f"jetstream-{port}"
        config = self.folder / f"nats-{port}.conf"
        config.write_text(f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{store}" }}\nfeature_flags {{ js_ack_fc_v2: false }}\n')
        part = self.start("nats-server", [str(Path(sys.executable).parent / "nats-server"), "-c", str(config)])
        wait_for_port(part, port)
        return part, f"nats://127.0.0.1:{port}"


def _stop(part: Part) -> None:
    """SIGTERM, then SIGKILL; both to the whole session, so that no child of a child is left."""
    for number, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        try:
            os.killpg(part.process.pid, number)
            os.killpg(part.process.pid, signal.SIGCONT)  # a suspended process would sleep through SIGTERM
        except ProcessLookupError:
            break
        try:
            part.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    for pipe in (part.process.stdin, part.process.stdout):
        if pipe is not None:
            pipe.close()


def wait_for_port(part: Part, port: int, patience_s: float = 15.0) -> None:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        part.check()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise BenchError(f"{part.name} does not listen on port {port} after {patience_s:g} s")


class LoadGenerator:
    """The bench's side of load.py."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def ask(self, **job: Any) -> dict[str, Any]:
        """Raises BenchError with the contestant's error."""
        process = self.part.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            process.wait(STOP_TIMEOUT_S)
            self.part.check()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(answer["error"])
        return answer

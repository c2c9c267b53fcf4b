"""Ports on this machine: which are free, and what to say about one that is not."""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 15_000
_given: set[int] = set()  # by this process, so that two calls in a row never answer the same


class PortInUse(Exception):
    """The text is one sentence that says what to do."""


def split(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`. Raises ValueError with a sentence."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"{address!r} is not an address: say HOST:PORT, for example 127.0.0.1:50051")
    return host.strip("[]"), int(port)


def shown_url(url: str) -> str:
    """Without user and password, which never reach a log."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    return f"{parts.scheme}://{parts.hostname}:{parts.port or 4222}"


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    try:
        with listening(port, host):
            return True
    except OSError:
        return False


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on, below the range that outgoing connections take theirs from.

    So a part that dies finds its port free when it starts again.
    """
    try:
        below = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError):
        below = 32_768
    candidates = range(_LOWEST, below) if below - _LOWEST > 1000 else range(_LOWEST, 65_536)
    for port in random.sample(candidates, min(len(candidates), 1000)):
        if port not in _given and is_free(port, host):
            _given.add(port)
            return port
    raise PortInUse(f"no free port was found on {host} between {candidates.start} and {candidates.stop}: name one")


def choose(port: int, option: str, host: str = "127.0.0.1") -> int:
    """`port` if it is free, a free one for 0. Raises PortInUse; `option` is what the person can change."""
    if port == 0:
        return free_port(host)
    if not is_free(port, host):
        raise PortInUse(f"port {port} on {host} is in use: stop what listens there or choose another one with {option} (0: any)")
    return port


@contextmanager
def listening(port: int, host: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A listener on the port, which therefore nobody else can take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT can be listened on
        listener.bind((host, port))
        listener.listen(1)
        yield listener

"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from nats_process import NatsProcess

# gRPC's own handling of fork crashes a child of a process that runs uvloop before its exec, once in a while.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsProcess]:
    """One server for the whole run; each test uses regions of its own."""
    server = NatsProcess(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[NatsProcess]:
    """A server for a test that kills it."""
    server = NatsProcess(tmp_path)
    server.start()
    yield server
    server.kill()

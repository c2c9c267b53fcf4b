"""An author's way, from `nearloop plugins new` to a gateway that uses the policy, and what happens when it is uninstalled."""

import asyncio
import os
import signal
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.client import NearloopClient
from gateway.client_retry import RetryPolicy
from gateway.errors import Rejected

NAME = "token_buckets"  # close to the name of a built-in policy
TOML = f"""
[auth]
anonymous_tenant = "local"

[tools]
modules = ["workers.builtin_tools"]

[worker]
drain_s = 1.0

[gateway]
drain_s = 1.0

[[policies]]
use = "{NAME}"
most = 1
"""


@dataclass
class Desk:
    """An author's environment: one of its own that sees what the tests' has."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "venv/bin/python")

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"TMPDIR": str(self.folder / "tmp"), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
        command = [self.python, "-P", "-m", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd or self.folder, timeout=60)

    def must(self, *arguments: str, cwd: Path | None = None) -> str:
        done = self.run(*arguments, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def nearloop(self, *arguments: str) -> str:
        return self.must("gateway.cli", *arguments)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    venv.EnvBuilder(symlinks=True, with_pip=False).create(tmp_path / "venv")
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    seen = "\n".join(f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages())
    (packages / "seen.pth").write_text(seen + "\n")
    (tmp_path / "tmp").mkdir()
    return Desk(tmp_path)


@contextmanager
def up(desk: Desk, toml: Path) -> Iterator[str]:
    """The address of a real gateway, with a nats-server and a tool worker."""
    command = [desk.python, "-P", "-m", "gateway.cli", "up", "--no-triton", "--listen", "127.0.0.1:0", "--config", str(toml)]
    env = os.environ | {"TMPDIR": str(desk.folder / "tmp"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            lines: list[str] = []
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith("ready:"):
                    break
            assert lines[-1].startswith("ready:"), "".join(lines)
            yield lines[-1].split("gateway ")[1].split(",")[0]
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()


async def answers(address: str, calls: int) -> list[object]:
    """Of calls that are made at once and not tried again: the output, or the error."""
    async with NearloopClient(address, retries=RetryPolicy(attempts=1), throttle=None) as client:

        async def call(number: int) -> object:
            try:
                return (await client.execute("tool", "echo", {"n": number}, timeout_s=20)).json
            except Rejected as error:
                return error

        return await asyncio.gather(*(call(number) for number in range(calls)))


@pytest.mark.stack
def test_from_a_new_policy_to_a_gateway_that_asks_it(desk: Desk) -> None:
    desk.nearloop("plugins", "new", NAME, "--slot", "admission", "--directory", str(desk.folder))
    package = desk.folder / "nearloop-token-buckets"
    desk.must("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", str(package))
    assert "\n11 passed in " in desk.must("pytest", "-q", "-p", "no:cacheprovider", cwd=package), "ten rules and a test of its own"
    assert "keeps the contract of the slot admission" in desk.nearloop("plugins", "check", NAME)
    (line,) = [line for line in desk.nearloop("plugins", "list").splitlines() if f" {NAME} " in line]
    assert f"{NAME} (nearloop-token-buckets)" in line

    toml = desk.folder / "gateway.toml"
    toml.write_text(TOML)
    with up(desk, toml) as address:
        found = asyncio.run(answers(address, 30))
    refused = [one for one in found if isinstance(one, Rejected)]
    assert refused, "thirty at once are more than one"
    assert {(one.reason, one.policy, one.scope) for one in refused} == {("TOO_MANY_AT_ONCE", NAME, "tenant:local")}
    assert all(one.retry_after_s is not None and 0.5 <= one.retry_after_s <= 0.75 for one in refused)
    assert len(refused) < 30, "one goes through"

    desk.must("pip", "uninstall", "--quiet", "--yes", "nearloop-token-buckets")
    toml.write_text(TOML + '\n[nats]\nurls = ["nats://127.0.0.1:1"]\n')
    sentence = f"policies.0 ({NAME}): there is no policy '{NAME}'; did you mean 'token_bucket'?"
    for command in (("gateway", "--config"), ("config", "check")):
        done = desk.run("gateway.cli", *command, str(toml))
        assert done.returncode == 1
        assert done.stderr.splitlines() == ["nearloop: policies: 1 mistake", f"  - {sentence}"]
    assert sys.executable != desk.python
    assert not list((desk.folder / "tmp").iterdir())

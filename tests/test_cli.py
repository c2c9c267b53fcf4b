"""The command line: help, exit codes, one sentence for each error. No server is needed."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway import __version__, addresses
from gateway.cli import app
from gateway.config import parse

COMMANDS = "up gateway worker demo key doctor execute submit get watch cancel targets run place".split()
runner = CliRunner(env={"NEARLOOP_DEBUG": None, "NEARLOOP_CONFIG": None, "NEARLOOP_ADDRESS": None, "COLUMNS": "200", "NO_COLOR": "1"})


def one_sentence(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("nearloop: ")
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        "config check",
        "program check",
        *(f"plugins {word}" for word in ("list", "describe", "check", "new")),
        *(f"runs {word}" for word in ("get", "watch", "cancel")),
    ],
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = runner.invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"nearloop {command}" in result.output.split("Example:", 1)[1]


def test_every_command_is_listed() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert {line.split()[1] for line in result.output.splitlines() if re.match(r"│ [a-z]+ ", line)} == {
        *COMMANDS,
        "config",
        "plugins",
        "program",
        "runs",
    }


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"nearloop {__version__}\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["explode"],
        ["execute"],
        ["execute", "teleport", "echo"],
        ["execute", "tool", "echo", "--input", "{"],
        ["execute", "tool", "echo", "--input", "@/nothing/here.json"],
        ["execute", "tool", "echo", "--timeout", "-1"],
        ["worker", "ovens", "--region", "home"],
        ["worker", "tools", "--region", "mars"],
        ["up", "--nats-port", "70000"],
        ["targets", "--address", "nowhere"],
        ["key", "--tenant", "a b"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(argv: list[str]) -> None:
    result = runner.invoke(app, argv)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("argv", ["execute tool echo", "submit tool echo", "get home-1", "watch home-1", "cancel home-1", "targets"])
def test_no_gateway_is_one_sentence(argv: str) -> None:
    address = f"127.0.0.1:{addresses.free_port()}"
    result = runner.invoke(app, [*argv.split(), "--address", address])
    assert result.exit_code == 1
    says = f"no gateway answers at {address}: start one with `nearloop up`, or name it with --address"
    assert one_sentence(result.stderr) == f"nearloop: UNAVAILABLE GATEWAY_UNREACHABLE: {says}"
    assert result.stdout == ""


def test_a_port_in_use_says_what_to_do() -> None:
    taken = addresses.free_port()
    with addresses.listening(taken):
        result = runner.invoke(app, ["up", "--no-triton", "--nats-port", str(taken)])
    assert result.exit_code == 1
    assert one_sentence(result.stderr) == (
        f"nearloop: port {taken} on 127.0.0.1 is in use: stop what listens there or choose another one with --nats-port (0: any)"
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["up", "--listen", "50051"], "is not an address: say HOST:PORT"),
        (["up", "--nats", "nats://127.0.0.1:1"], "no NATS server answers at nats://127.0.0.1:1"),
        (["up", "--config", "/nothing.toml"], "/nothing.toml: 1 mistake"),
        (["gateway"], "no NATS server is configured for region 'home'"),
        (["worker", "tools", "--region", "home"], "no NATS server is configured for region 'home'"),
    ],
)
def test_what_cannot_start_says_why(argv: list[str], says: str) -> None:
    result = runner.invoke(app, argv)
    assert result.exit_code == 1
    assert result.stderr.startswith("nearloop: ")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_passwords_of_urls_are_not_shown() -> None:
    result = runner.invoke(app, ["up", "--no-triton", "--nats", "nats://me:secret@127.0.0.1:1"])
    assert result.exit_code == 1
    assert "secret" not in result.output


def test_key_and_its_hash() -> None:
    result = runner.invoke(app, ["key", "--tenant", "acme"])
    assert result.exit_code == 0
    shown, _, section = result.stdout.partition("For the configuration:\n")
    key = shown.split("shown once: ")[1].strip()
    assert key not in section
    config = parse({"auth": tomllib.loads(section)["auth"]})
    assert config.auth.keys[0].tenant == "acme"
    assert config.auth.keys[0].sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert key not in runner.invoke(app, ["key"]).stdout


def test_config_check_reports_all_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('[gateway]\nlisten_on = "x"\nmax_input_bytes = -1\n[[regions]]\nname = "Not A Region"\n')
    result = runner.invoke(app, ["config", "check", str(file)])
    assert result.exit_code == 1
    assert "3 mistakes" in result.stderr
    assert result.stderr.count("\n  - ") == 3
    file.write_text('[auth]\nanonymous_tenant = "demo"\n')
    result = runner.invoke(app, ["config", "check", str(file)])
    assert result.exit_code == 0
    assert f"{file} is valid: regions home" in result.stdout


def test_a_bug_is_one_sentence_unless_debugging(tmp_path: Path) -> None:
    script = "import gateway.cli as c, gateway.cli_doctor as d\ndef boom(*_): raise ZeroDivisionError('two')\nd.load = boom\nc.main()"
    argv = [sys.executable, "-P", "-c", script, "doctor"]
    env = {name: value for name, value in os.environ.items() if name != "NEARLOOP_DEBUG"}
    quiet = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert (quiet.returncode, quiet.stderr) == (1, "nearloop: unexpected ZeroDivisionError: two (NEARLOOP_DEBUG=1 shows where)\n")
    loud = subprocess.run(argv, capture_output=True, text=True, check=False, env=env | {"NEARLOOP_DEBUG": "1"})
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr


def test_help_does_not_import_the_servers() -> None:
    script = (
        "import sys\nfrom gateway.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "import json; print(json.dumps(sorted(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script, "--help"], capture_output=True, text=True, check=True)
    modules = set(json.loads(result.stdout.splitlines()[-1]))
    assert not modules & {"grpc", "nats", "tritonclient", "qdrant_client", "uvloop", "numpy", "opentelemetry.sdk"}

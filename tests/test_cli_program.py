"""`nearloop program check`: what an author of a program sees."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cli_program import _told
from gateway.types import Kind, Target

PROGRAMS = Path(__file__).parent / "programs"
runner = CliRunner(env={"NEARLOOP_DEBUG": None, "NEARLOOP_ADDRESS": None, "COLUMNS": "200", "NO_COLOR": "1"})


@pytest.mark.parametrize("name", ["chain.yaml", "fanout.json", "agent.yaml"])
def test_a_right_program_is_valid_and_its_bound_is_told(name: str) -> None:
    result = runner.invoke(app, ["program", "check", str(PROGRAMS / name)])
    assert result.exit_code == 0, result.output
    assert f"{PROGRAMS / name} is valid: at most " in result.stdout
    assert "--live" in result.stderr


def test_everything_wrong_is_said_at_once_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        "program: nearloop/v1\nname: wrong\nsteps:\n"
        "  - {id: a, tool: fetch, input: {x: '${steps.b.output}'}}\n"
        "  - {id: b, tool: fetch, input: {x: '${input.}'}}\n"
        "  - {id: b, while: 'true', maximum: 3, steps: [{id: c, tool: fetch, input: {}}]}\n"
    )
    result = runner.invoke(app, ["program", "check", str(file)])
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) >= 3
    for place in ("steps[0].input.x", "steps[1].input.x", "steps[2]"):
        assert any(place in line for line in lines), (place, lines)
    document = json.loads(runner.invoke(app, ["program", "check", str(file), "--json"]).stdout)
    assert not document["valid"]
    assert {finding["severity"] for finding in document["findings"]} >= {"error"}


@pytest.mark.parametrize(("content", "said"), [(b"\xff\xfe", "UTF-8"), (b"steps: [", "error: "), (b"", "error: ")])
def test_a_file_that_is_no_program(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    result = runner.invoke(app, ["program", "check", str(file)])
    assert result.exit_code == 1
    assert said in result.stderr


def test_targets_of_a_gateway_are_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    known = {
        target.scope: target for target in (Target(Kind.RETRIEVE, "docs"), Target(Kind.INFER, "plan"), Target(Kind.TOOL, "fetch_page"))
    }
    assert not _told(PROGRAMS / "chain.yaml", known, as_json=False)
    assert "fetch_page" in capsys.readouterr().err, "the nearest name"


def test_without_a_gateway_live_says_so_in_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = runner.invoke(app, ["program", "check", str(PROGRAMS / "chain.yaml"), "--live", "--address", address])
    assert result.exit_code == 1
    assert result.stderr.startswith("nearloop: UNAVAILABLE")

"""nearloop run, place and runs, as processes against a gateway with a fake service."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import pytest
from fake_runs import SOURCE, FakeRuns, never, serving, usual
from fake_service import ALICE
from typer.testing import CliRunner

from gateway import addresses
from gateway.cli import app
from gateway.errors import StepFailed
from gateway.run_types import RunOrder
from gateway.types import Lane

runner = CliRunner(env={"NEARLOOP_DEBUG": None, "NEARLOOP_ADDRESS": None, "COLUMNS": "200", "NO_COLOR": "1"})
OUTPUT = {"text": "hello", "big": 2**60}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "greet.yaml"
    file.write_text(SOURCE)
    return file


async def begin(port: int, *argv: object) -> asyncio.subprocess.Process:
    env = {name: value for name, value in os.environ.items() if name not in ("NEARLOOP_DEBUG", "NEARLOOP_ADDRESS")}
    env |= {"NEARLOOP_API_KEY": ALICE, "COLUMNS": "200", "NO_COLOR": "1"}
    words = [sys.executable, "-P", "-m", "gateway.cli", *map(str, argv), "--address", f"127.0.0.1:{port}"]
    return await asyncio.create_subprocess_exec(*words, stdout=PIPE, stderr=PIPE, stdin=asyncio.subprocess.DEVNULL, env=env)


async def nearloop(runs: FakeRuns, *argv: object) -> tuple[int | None, str, list[str]]:
    """Exit code, stdout, lines of stderr."""
    async with serving(runs) as port:
        process = await begin(port, *argv)
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode().splitlines()


async def test_a_run_is_shown_live_and_its_output_is_alone_on_stdout(program: Path) -> None:
    runs = FakeRuns()
    options = (
        "--key k --lane batch --timeout 9 --region iad --region home --allow tool.docs --allow tool.echo --tokens --speculate 2".split()
    )
    code, out, err = await nearloop(runs, "run", program, "--input", '{"name": "x"}', *options)
    assert code == 0, err
    assert json.loads(out) == OUTPUT
    run_id = next(iter(runs.runs))
    assert err == [
        f"{run_id} accepted: greet in iad, 4.0 ms of waiting expected",
        "started in iad by run-1",
        "  look -> tool.docs",
        '  look done in iad after 2.1 ms: {"n": 1, "big": 1152921504606846976}',
        "      each/0/say -> tool.echo, attempt 2",
        "      each/0/say failed after 0.1 ms: UNAVAILABLE DOWN: is down",
        "  think: Hello",
        "  large done after 0.0 ms, replayed, speculated: 70000 bytes",
        "3 steps in iad, 2 guessed and 1 of them in vain: 0.004 s of dead time waited, 0.156 s saved",
    ]
    (order,) = runs.orders
    assert (order.idempotency_key, order.lane, order.regions, order.tokens) == ("k", Lane.BATCH, ("iad", "home"), True)
    assert (order.allow, order.speculate, order.input) == (("tool.docs", "tool.echo"), 2, {"name": "x"})


async def test_quiet_leaves_output_and_summary(program: Path) -> None:
    code, out, err = await nearloop(FakeRuns(), "run", program, "--quiet")
    assert (code, json.loads(out)) == (0, OUTPUT)
    assert len(err) == 1
    assert err[0].startswith("3 steps in iad")


async def test_json_is_one_line_for_each_event(program: Path, tmp_path: Path) -> None:
    body = tmp_path / "input.json"
    body.write_text('{"name": "from a file"}')
    runs = FakeRuns()
    code, out, err = await nearloop(runs, "run", program, "--input", f"@{body}", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, [])
    assert [line["event"] for line in lines] == (
        "accepted started step_started step_ended step_started step_ended token token step_ended summary result".split()
    )
    assert lines[0]["placement"]["estimates"][2] == {"region": "fra", "dead_s": None, "why": [], "excluded": "no runner lives there"}
    assert lines[-1]["output"] == OUTPUT
    assert runs.orders[0].input == {"name": "from a file"}


async def test_a_run_that_fails_is_exit_code_1_and_one_sentence(program: Path) -> None:
    runs = FakeRuns()

    async def fails(order: RunOrder) -> Any:
        raise StepFailed("look: no page", code="NOT_FOUND", reason="TOOL_ERROR")
        yield

    runs.on_run = fails
    code, out, err = await nearloop(runs, "run", program)
    assert (code, out) == (1, "")
    assert err[-1] == "nearloop: NOT_FOUND TOOL_ERROR: look: no page"


async def test_a_wrong_program_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(SOURCE.replace("echo", "ecko"))
    code, _, err = await nearloop(FakeRuns(), "run", file)
    assert code == 1
    (line,) = err
    assert line.startswith("nearloop: INVALID_ARGUMENT INVALID_STEP: run.source.steps[1].tool: there is no target tool.ecko")


async def test_stopping_the_command_says_that_the_run_goes_on(program: Path) -> None:
    runs = FakeRuns()
    runs.on_run = never
    async with serving(runs) as port:
        process = await begin(port, "run", program)
        assert process.stderr is not None
        while b"started in iad" not in await process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    run_id = next(iter(runs.runs))
    assert f"`nearloop runs watch {run_id}` follows it" in err.decode()
    assert process.returncode == 130
    assert not any(call[0] == "cancel" for call in runs.calls)


async def test_detached_runs_are_found_watched_and_cancelled(program: Path) -> None:
    runs = FakeRuns()
    runs.on_watch = lambda attempt, after: usual(runs.orders[0])
    code, out, err = await nearloop(runs, "run", program, "--detach", "--key", "k")
    run_id = out.strip()
    assert (code, err) == (0, ["accepted, queued, in iad"])
    assert run_id in runs.runs
    runs.end(run_id, b'{"n": 1}')
    code, out, err = await nearloop(runs, "runs", "get", run_id)
    assert (code, json.loads(out)) == (0, {"n": 1})
    assert err == [
        f"{run_id} is done: greet, lane interactive, region iad",
        '  look {"n": 1152921504606846976}',
        "      each/0/say 70000 bytes",
    ]
    code, out, err = await nearloop(runs, "runs", "watch", run_id)
    assert (code, json.loads(out)) == (0, OUTPUT)
    assert err[0] == "started in iad by run-1"
    code, out, err = await nearloop(runs, "runs", "cancel", run_id, "--json")
    assert (code, json.loads(out)["state"]) == (0, "cancelled")
    code, _, err = await nearloop(runs, "runs", "get", "home-nothing")
    assert (code, err) == (1, ["nearloop: NOT_FOUND RUN_NOT_FOUND: there is no run home-nothing"])


async def test_a_placement_is_a_table(program: Path) -> None:
    code, out, _ = await nearloop(FakeRuns(), "place", program, "--region", "iad")
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()] == ["region", "iad *", "home", "fra"]
    assert "4.0 ms" in out
    assert "tool.docs 2.0 ms, 2 times" in out
    assert "not known" in out
    assert "excluded: no runner lives there" in out
    code, out, _ = await nearloop(FakeRuns(), "place", program, "--json")
    assert json.loads(out)["region"] == "iad"


@pytest.mark.parametrize("argv", ["run {}", "place {}", "runs get home-1", "runs watch home-1", "runs cancel home-1"])
def test_no_gateway_is_one_sentence(argv: str, program: Path) -> None:
    address = f"127.0.0.1:{addresses.free_port()}"
    result = runner.invoke(app, [*argv.format(program).split(), "--address", address])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"nearloop: UNAVAILABLE GATEWAY_UNREACHABLE: no gateway answers at {address}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "options"), [(b"\xff", []), (b"a", ["--input", "{"]), (b"a", ["--input", "NaN"]), (b"a", ["--speculate", "17"])]
)
def test_a_wrong_command_line_is_exit_code_2(content: bytes, options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes(content)
    result = runner.invoke(app, ["run", str(file), *options])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_a_file_that_is_not_there_is_exit_code_2(tmp_path: Path) -> None:
    assert runner.invoke(app, ["run", str(tmp_path / "none.yaml")]).exit_code == 2

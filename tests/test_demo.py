"""`nearloop demo`: real agents through the whole real stack, and nothing left behind, however it ends."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import psutil
import pytest
from rich.console import Console
from stack_support import Footprint, running
from test_models import QUESTIONS, SHARE_ANSWERED

from gateway import addresses
from gateway.client import NearloopClient
from gateway.demo import agent, loop, run
from gateway.demo.backend import Ledger
from gateway.up import Stack

pytestmark = pytest.mark.stack

QUESTION = "how do I copy a directory tree?"


async def test_a_question_is_answered_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    footprints: list[Footprint] = []

    class Watched(Stack):
        async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
            footprints.append(Footprint.of(self))
            await super().__aexit__(kind, error, trace)

    monkeypatch.setattr(run, "Stack", Watched)
    children = {child.pid for child in psutil.Process().children()}
    output = io.StringIO()
    assert await run.run_demo(run.DemoOptions(ask=(QUESTION,)), Console(file=output, width=120)) == 0
    said = output.getvalue()
    assert "shutil.copytree(src, dst" in said
    assert "Recursively copy a directory tree" in said.split("evidence:")[1]
    table = said.split("Where the time went")[1]
    for target in ("infer plan @ iad", "infer judge @ iad", "retrieve stdlib @ iad", "tool docs @ iad"):
        assert target in table
    assert "80 ms to and fro" in said
    assert_the_loop_was_shown_both_ways(said.split("The same loop")[1])
    assert re.search(r'export NATS_URL="\$\(cat /\S+/nats\.url\)"', said)
    assert not re.search(r"nats://[^/\s]*@", said)
    (footprint,) = footprints
    assert footprint.processes
    assert footprint.left() == []
    assert {child.pid for child in psutil.Process().children()} <= children


def assert_the_loop_was_shown_both_ways(said: str) -> None:
    placement, table = said.split("Milliseconds after which")
    assert re.search(r"^ +iad \* +\d+ ms +the client in home is \d+\.\d ms away", placement, re.M), placement
    assert re.search(r"^ +home +\d+ ms +\S.* each through iad", placement, re.M), placement
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    calls = ["infer plan", "retrieve stdlib", "infer plan", "tool docs", "infer plan", "infer judge", "infer plan"]
    assert [row[0] for row in rows] == [*calls, "the whole loop", "calls", "round trips between the regions"]
    assert rows[-2][1:] == ["7", "7"]
    assert rows[-1][1:] == ["7", "1"]
    assert "Both answered: shutil.copytree\n" in table
    saved = re.search(r"Dead time saved: (-?\d+) ms as measured here, (\d+) ms by the summary", table)
    assert saved
    assert int(saved[2]) > 0


async def test_the_share_of_questions_answered_through_the_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    port = addresses.free_port()
    questions = [entry["question"] for entry in QUESTIONS]
    ledger = Ledger()
    regions = {"regions": run.REGIONS, "wan": run.WAN_S}
    async with (
        running(run.demo_config(port), workers=run.WORKERS, extra=[run.docs_part(port)], **regions) as stack,
        NearloopClient(stack.gateway_address, region=loop.ORIGIN) as client,
    ):
        await run.build_index(client, Console(file=io.StringIO(), width=120))
        outcomes = await run.ask_all(client, questions, ledger)
    failed = [repr(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
    assert failed == []
    names = {outcome.question: outcome.name for outcome in outcomes if isinstance(outcome, agent.Answer)}
    right = [entry["question"] for entry in QUESTIONS if names[entry["question"]] in entry["names"]]
    with capsys.disabled():
        print(f"\nanswered through the gateway: {len(right)} of {len(questions)}, {len(right) / len(questions):.0%}")  # noqa: T201
    assert len(right) / len(questions) >= SHARE_ANSWERED, sorted(set(questions) - set(right))
    # Each answer came out of steps, and of no shortcut.
    assert ledger.by_target["infer plan @ iad"].steps >= 2 * len(questions)
    assert sum(spent.steps for name, spent in ledger.by_target.items() if name.startswith("tool docs")) >= len(right)


@pytest.mark.parametrize(
    ("moment", "unsaid", "code"),
    [("nats-home ", "Indexed", 130), ("  agent 1", "Where the time went", 130), ("Stopping", "Traceback", 0)],
    ids=["while it starts", "while agents think", "while it stops"],
)
def test_ctrl_c_leaves_nothing(tmp_path: Path, moment: str, unsaid: str, code: int) -> None:
    command = [sys.executable, "-P", "-m", "gateway.cli", "demo"]
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(moment):
                    break
            started = psutil.Process(process.pid).children(recursive=True)
            prefixes = set(re.findall(r"nearloop-[0-9a-f]+-", " ".join(word for child in started for word in command_line(child))))
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert started
    assert process.returncode == code, errors
    assert unsaid not in rest
    assert "Traceback" not in errors
    assert [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert list(tmp_path.iterdir()) == []
    assert prefixes
    assert [path for path in Path("/dev/shm").iterdir() if any(prefix in path.name for prefix in prefixes)] == []


def command_line(process: psutil.Process) -> list[str]:
    """Empty when it has ended just now."""
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []

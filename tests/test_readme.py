"""The samples of README.md, run as they stand against a real stack; only the address is another one."""

import asyncio
import logging
import os
import re
import shlex
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from stack_support import running

from gateway import config
from gateway.cli_up import settle
from gateway.edge import run_programs
from gateway.program.check import check
from gateway.program.model import MOST_PARALLEL, MOST_STEPS, Program
from gateway.program.parse import load_text
from gateway.up import Stack
from workers import run_calls

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in text]
    assert len(found) == 1, f"{len(found)} blocks of {language} with {containing!r}"
    return str(found[0])


async def run(*argv: str, address: str, cwd: Path = ROOT) -> tuple[int, str]:
    environment = os.environ | {"NEARLOOP_ADDRESS": address, "COLUMNS": "120"}
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}
    process = await asyncio.create_subprocess_exec(*argv, env=environment, cwd=cwd, **pipes)
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, output.decode()


@pytest.mark.stack
async def test_the_first_client_and_the_commands_work(tmp_path: Path) -> None:
    assert "--config config/local.toml" in README
    local = config.load(ROOT / "config/local.toml")
    local = local.model_copy(update={"gateway": local.gateway.model_copy(update={"listen": "127.0.0.1:0"})})
    async with running(local, triton=False) as stack:
        sample = block("python", "NearloopClient").replace("127.0.0.1:50051", stack.gateway_address)
        (tmp_path / "client.py").write_text(sample)
        code, output = await run(sys.executable, "-P", str(tmp_path / "client.py"), address=stack.gateway_address)
        assert code == 0, output
        assert "{'hello': 'world'}" in output
        assert "result" in output.lower()
        session = block("python", "client.session()")
        lines = [f"        {line}" for line in session.splitlines()]
        whole = sample[: sample.index("        result =")] + "\n".join(lines) + "\n        print(len(results))\n\n\nasyncio.run(main())\n"
        (tmp_path / "session.py").write_text(whole)
        code, output = await run(sys.executable, "-P", str(tmp_path / "session.py"), address=stack.gateway_address)
        assert (code, output) == (0, "100\n")
        commands = [shlex.split(line) for line in block("bash", "nearloop targets").splitlines() if line.startswith("nearloop ")]
        assert [command[1] for command in commands] == ["execute", "submit", "targets", "doctor"]
        for command in commands:
            code, output = await run(sys.executable, "-P", "-m", "gateway.cli", *command[1:], address=stack.gateway_address)
            assert code == 0, f"{command}: {output}"


def the_program_in_python() -> Program:
    names: dict[str, Any] = {}
    exec(block("python", "p.loop"), names)
    built = names["program"]
    assert isinstance(built, Program)
    return built


def test_the_program_is_the_same_in_both_languages() -> None:
    assert the_program_in_python() == load_text(block("yaml", "name: count"), "count.yaml")
    assert check(the_program_in_python()) == []


@pytest.mark.stack
async def test_the_run_and_its_commands_work(tmp_path: Path) -> None:
    (tmp_path / "count.yaml").write_text(block("yaml", "name: count"))
    sample = block("python", "client.run(")
    client = f"import asyncio\nfrom pathlib import Path\nfrom gateway.client import NearloopClient\n{block('python', 'p.loop')}\n"
    client += "async def main():\n    async with NearloopClient('ADDRESS') as client:\n"
    client += "".join(f"        {line}\n" for line in sample.splitlines()) + "        print('output', output)\n\nasyncio.run(main())\n"
    async with stack_of("--config config/local.toml --regions home,iad,sjc --wan-ms 80") as stack:
        (tmp_path / "client.py").write_text(client.replace("ADDRESS", stack.gateway_address))
        code, output = await run(sys.executable, "-P", "client.py", address=stack.gateway_address, cwd=tmp_path)
        assert code == 0, output
        kinds = [line.split("(")[0] for line in output.splitlines()]
        assert kinds == ["ClientRun", "RunStarted", *["StepStarted", "StepEnded"] * 10, "Summary", "RunOutput", "output {'reached': 10}"]
        commands = [shlex.split(line, comments=True) for line in block("sh", "nearloop run ").splitlines()]
        assert [command[:2] for command in commands] == [["nearloop", word] for word in ("program", "place", "run", "runs")]
        said = []
        for command in commands:
            code, output = await run(sys.executable, "-P", "-m", "gateway.cli", *command[1:], address=stack.gateway_address, cwd=tmp_path)
            assert code == 0, f"{command}: {output}"
            said.append(output)
        assert all(re.search(rf"^{region}\b", said[1], re.M) for region in ("home", "iad", "sjc"))
        assert '"reached": 10' in said[2]
        assert all(word in said[3] for word in ("get", "watch", "cancel"))


def stack_of(options: str) -> AbstractAsyncContextManager[Stack]:
    """What `nearloop up` with these words of the README starts, without models."""
    assert f"nearloop up {options}`" in README
    words = dict(zip(shlex.split(options)[::2], shlex.split(options)[1::2], strict=True))
    names = words["--regions"].split(",")
    local = config.load(ROOT / words["--config"])
    local = local.model_copy(update={"gateway": local.gateway.model_copy(update={"listen": "127.0.0.1:0"})})
    settled = settle(local, False, "", "", "", log.info, names)
    return running(settled, triton=False, regions=names, wan=dict.fromkeys(names[1:], float(words["--wan-ms"]) / 1000))


def test_what_the_readme_says_of_limits_is_so() -> None:
    said = README.split("At most: ")[1].split("\n\n")[0]
    section = config.parse({}).gateway
    assert f"{run_programs.MOST_PROGRAM_BYTES // 1024} KiB of program" in said
    assert f"{section.max_input_bytes // 1024**2} MiB of input" in said
    assert f"{MOST_STEPS} steps, {MOST_PARALLEL} of them at a time" in said
    assert f"{run_calls.MOST_OUTPUT_BYTES // 1024**2} MiB of output a step, an hour" in said
    assert section.max_timeout_s == 3600


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:.*##", makefile, re.M), f"make {target} is not documented in the Makefile"

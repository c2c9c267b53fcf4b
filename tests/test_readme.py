"""The samples of README.md, run as they stand against a real stack; only the address is another one."""

import asyncio
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from stack_support import running

from gateway import config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in text]
    assert len(found) == 1, f"{len(found)} blocks of {language} with {containing!r}"
    return str(found[0])


async def run(*argv: str, address: str) -> tuple[int, str]:
    environment = os.environ | {"NEARLOOP_ADDRESS": address, "COLUMNS": "120"}
    process = await asyncio.create_subprocess_exec(*argv, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
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


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:.*##", makefile, re.M), f"make {target} is not documented in the Makefile"

"""The real NATS CLI beside a running stack: what an operator sees, and that every command of config/README.md runs."""

import asyncio
import json
import re
import shlex
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nats_cli_support import CLI, CONFIG, HINT, ROOT, Desk, shop
from stack_support import Broker, eventually, running

from gateway import addresses, config, subjects
from gateway.client import ClientResult, NearloopClient
from gateway.config import NatsSection
from gateway.edge import probes
from gateway.edge.link import Link
from gateway.errors import Unavailable
from gateway.parts import find_nats_server
from gateway.types import JobState

GUIDE = (ROOT / "config/README.md").read_text()
pytestmark = [pytest.mark.stack, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def desk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Desk]:
    if CLI is None:
        pytest.skip(f"the NATS CLI is not here: {HINT}")
    port = addresses.free_port()
    parsed = config.loads(CONFIG.replace("SHOP", f"http://127.0.0.1:{port}"), "cli")
    async with (
        running(parsed, triton=False, workers=[("tool", "home")]) as stack,
        NearloopClient(stack.gateway_address) as client,
        Broker(stack.nats_url) as broker,
    ):
        yield Desk(stack, client, broker, tmp_path_factory.mktemp("home"), port)


async def test_streams_are_listed(desk: Desk) -> None:
    listed = await desk.nats("stream", "ls")
    for name in ("NL_STEPS_HOME", "NL_RESULTS", "NL_DEAD", "NL_RUNS"):
        assert name in listed


async def test_a_queued_step_is_readable(desk: Desk) -> None:
    job = await desk.client.submit("tool", "report", {"month": "2025-01"}, idempotency_key="report-1", run="books", timeout_s=600)
    subject = f"nl.step.home.tool.report.standard.{job.id}"
    assert subject in await desk.nats("stream", "subjects", "NL_STEPS_HOME", "nl.step.>")
    shown = await desk.nats("stream", "get", "NL_STEPS_HOME", "--last-for", "nl.step.home.tool.report.>")
    assert subject in shown
    for header in ("Nl-Tenant: local", "Nl-Run: books", "Nl-Idempotency-Key: report-1", "Nl-Content-Type: application/json"):
        assert header in shown
    assert '{"month":"2025-01"}' in shown
    deadline = re.search(r"Nl-Deadline-Ms: (\d+)", shown)
    assert deadline
    assert 0 < int(deadline.group(1)) / 1000 - time.time() <= 600


async def test_a_step_passes_by(desk: Desk) -> None:
    seen = await desk.watched("sub", "nl.step.>", "--count", "1")
    assert 'Received on "nl.step.home.tool.echo.standard.' in seen
    assert "Nl-Run: agent-1" in seen
    assert "Nl-Reply: nl.reply." in seen
    assert '{"hello":"world"}' in seen


async def test_consumers_are_reported(desk: Desk) -> None:
    for command in ("report", "ls"):
        shown = await desk.nats("consumer", command, "NL_STEPS_HOME")
        assert {"tool-echo-interactive", "tool-echo-standard", "tool-echo-batch"} <= set(re.findall(r"tool-\w+-\w+", shown))
    info = await desk.nats("consumer", "info", "NL_STEPS_HOME", "tool-echo-standard")
    assert "Filter Subject: nl.step.home.tool.echo.standard.*" in info
    assert "Priority Policy: Prioritized" in info


async def test_services_are_shown_with_counters_that_grow(desk: Desk) -> None:
    listed = await desk.nats("service", "ls")
    for name in ("nearloop-gateway", "nearloop-tool"):
        assert name in listed
    info = await desk.nats("service", "info", "nearloop-tool")
    assert "Subject: nl.step.home.tool.echo.>" in info
    assert "region: home" in info
    before = await desk.stats("nearloop-tool"), await desk.stats("nearloop-gateway")
    for _ in range(5):
        await desk.client.execute("tool", "echo", {"n": 1}, timeout_s=10)
    after = await desk.stats("nearloop-tool"), await desk.stats("nearloop-gateway")
    assert after[0]["echo"] == before[0]["echo"] + 5
    assert after[1]["steps"] == before[1]["steps"] + 5


async def test_buckets_are_readable(desk: Desk) -> None:
    listed = await desk.nats("kv", "ls")
    assert "nl-targets" in listed
    assert "nl-workers" in listed
    assert "tool.echo" in await desk.nats("kv", "get", "nl-targets", "tool.echo")
    target = json.loads(await desk.nats("kv", "get", "nl-targets", "tool.echo", "--raw"))
    assert (target["kind"], target["name"], target["home_region"]) == ("tool", "echo", "home")
    (worker,) = (await desk.nats("kv", "ls", "nl-workers")).split()
    assert worker.startswith("home.tool-")


def guide_commands() -> list[str]:
    """The `nats` lines of the guide's code blocks, in order; a line that ends with a backslash goes on."""
    blocks = re.findall(r"^```console\n(.*?)^```", GUIDE, re.S | re.M)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ nats ")]


async def test_every_command_of_the_guide_runs(desk: Desk) -> None:
    commands = guide_commands()
    assert len(commands) >= 20
    await desk.client.execute("tool", "echo", {"hello": "world"}, timeout_s=10)
    await desk.client.submit("tool", "report", {"month": "2025-01"}, idempotency_key="report-2")
    run = await desk.client.submit_run("program: nearloop/v1\nname: greet\nsteps: [{id: greet, tool: echo}]\n", {}, timeout_s=600)
    async with shop(desk.shop_port, hangs=True) as hanging:

        async def calls() -> int:
            return hanging.calls

        job = await desk.client.submit("tool", "charge", {"order": 7}, idempotency_key="order-7")
        for call in (1, 2):  # every worker that gets the order dies of it
            await eventually(calls, lambda count, call=call: count == call, 30, f"call {call}")
            await desk.stack.kill("tool-home")
        await eventually(lambda: desk.client.get_job(job.id), lambda found: found.state is JobState.DEAD, 30, "a dead letter")

    async def workers() -> list[str]:
        return (await desk.nats("kv", "ls", "nl-workers")).split()

    (worker,) = await eventually(workers, lambda found: len(found) == 1, 30, "the dead workers are forgotten")
    deadline_ms = str(round((time.time() + 600) * 1000))

    async def statuses() -> list[str]:
        return [key for key in (await desk.nats("kv", "ls", "nl-policy")).split() if key.startswith("status.gateway")]

    async with shop(desk.shop_port):
        for command in commands:
            filled = (
                command.replace("JOB_ID", job.id)
                .replace("RUN_ID", run.id)
                .replace("DEADLINE_MS", deadline_ms)
                .replace("REGION.WORKER", worker)
            )
            if "GATEWAY" in filled:
                (gateway,) = await eventually(statuses, bool, 10, "a status of the changed policy")
                filled = filled.replace("GATEWAY", gateway.split(".")[1])
            arguments = shlex.split(filled)[1:]
            await (desk.watched if "--count" in arguments else desk.nats)(*arguments)
        # Among them were those that replay a dead letter.
        found = await eventually(lambda: desk.client.get_job(job.id), lambda found: found.state is JobState.DONE, 20, "the replayed job")
    assert found.result is not None
    assert found.result.json == {"paid": 7}
    assert (await desk.broker.state("NL_DEAD"))[0][0] == 0


def guide_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.S | re.M)


async def test_the_permissions_of_the_guide_are_enough(tmp_path: Path) -> None:
    port = addresses.free_port()
    common = f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{tmp_path}/store" }}\nfeature_flags {{ js_ack_fc_v2: false }}\n'
    (tmp_path / "nats.conf").write_text(common + guide_blocks("conf")[0])
    log = tmp_path / "nats.log"
    with log.open("wb") as output:
        server = await asyncio.create_subprocess_exec(
            find_nats_server(), "-c", str(tmp_path / "nats.conf"), stdin=DEVNULL, stdout=output, stderr=output
        )
    try:

        async def ready() -> bool:
            try:
                return await probes.nats_ready(f"nats://127.0.0.1:{port}")
            except OSError:
                return False

        await eventually(ready, bool, 10, "nats-server")
        url = f"nats://nearloop:secret@127.0.0.1:{port}"
        parsed = config.loads(CONFIG.replace("SHOP", "http://127.0.0.1:9").replace("[nats]", f'[nats]\nurls = ["{url}"]'), "external")
        async with running(parsed, triton=False) as stack, NearloopClient(stack.gateway_address) as client:
            assert (await client.execute("tool", "echo", {"n": 1}, timeout_s=10)).json == {"n": 1}
            job = await client.submit("tool", "echo", {"n": 2}, idempotency_key="external")
            assert isinstance([item async for item in client.watch(job.id, timeout_s=10)][-1], ClientResult)
            queued = await client.submit("tool", "report", {"n": 3}, idempotency_key="external")
            assert (await client.cancel(queued.id)).state is JobState.CANCELLED
            assert not any("secret" in stack.part(name).log.tail() for name in stack.part_names)
        assert "Permissions Violation" not in log.read_text()
    finally:
        server.terminate()
        await server.wait()


async def test_a_password_is_not_told_when_no_server_answers() -> None:
    link = Link(NatsSection(), (f"nats://nearloop:secret@127.0.0.1:{addresses.free_port()}",), "link")
    with pytest.raises(Unavailable) as caught:
        await link.start(0.3)
    assert "127.0.0.1" in caught.value.message
    assert "secret" not in caught.value.message


async def test_the_settings_of_the_guide_are_valid() -> None:
    cluster, regions = (config.loads(block, "guide") for block in guide_blocks("toml"))
    assert cluster.nats.replicas == 3
    assert [regions.domain(name) for name in regions.region_names] == ["home", "iad"]


async def test_the_server_of_another_region_is_valid(tmp_path: Path) -> None:
    (tmp_path / "nats.conf").write_text(guide_blocks("conf")[1])
    check = await asyncio.create_subprocess_exec(
        find_nats_server(), "-t", "-c", str(tmp_path / "nats.conf"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await check.communicate()
    assert check.returncode == 0, output.decode()


async def test_the_guide_names_every_subject_stream_bucket_and_header() -> None:
    words = {value for name, value in vars(subjects).items() if name.startswith("H_")}
    words |= {
        subjects.RESULTS_STREAM,
        subjects.DEAD_STREAM,
        subjects.RUNS_STREAM,
        subjects.REGIONS_BUCKET,
        subjects.VALUES_BUCKET,
        subjects.TARGETS_BUCKET,
        subjects.WORKERS_BUCKET,
        subjects.HANDBACKS_BUCKET,
        subjects.POLICY_BUCKET,
    }
    words |= set(re.findall(r"^ {4}(nl\.[a-z]+\.)", subjects.__doc__ or "", re.M))
    assert len(words) > 30
    assert not {word for word in words if f"`{word}" not in GUIDE}

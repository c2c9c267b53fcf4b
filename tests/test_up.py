"""The whole stack on real parts: ready, restarted, used by address, and gone without a trace."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway import addresses
from gateway.config import Config, parse
from gateway.edge import probes
from gateway.supervisor import PartFailed
from gateway.up import Stack, default_workers

pytestmark = pytest.mark.stack

DOCUMENT = {
    "gateway": {"listen": "127.0.0.1:0", "drain_s": 1.0},
    "auth": {"anonymous_tenant": "demo"},
    "tools": {"modules": ["workers.builtin_tools"]},
    "worker": {"drain_s": 1.0},
}

HELD = ("infer", "busy", "--input", '{"ms": 3000}', "--timeout", "60")


def configuration(**sections: object) -> Config:
    return parse(DOCUMENT | sections)


def nearloop(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "gateway.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env, timeout=60)


def echo(address: str) -> object:
    done = nearloop("execute", "tool", "echo", "--input", '{"n": 1.0}', "--json", "--timeout", "20", NEARLOOP_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["output"]


def processes_of(state_dir: Path) -> list[str]:
    """Command lines of what runs with this state directory."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(state_dir) in line and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(line)
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("nearloop-*")}


async def test_two_gateways_two_regions_and_what_dies_comes_back() -> None:
    lines: list[str] = []
    config = configuration(regions=[{"name": "home"}, {"name": "iad"}])
    async with Stack(config, on_line=lines.append, gateways=2, triton=False) as stack:
        state_dir = stack.state_dir
        assert stack.part_names == ("nats", "tool-home", "tool-iad", "run-home", "run-iad", "gateway", "gateway-2")
        assert sum("ready in" in line for line in lines) == 7
        written = json.loads((state_dir / "addresses.json").read_text())
        assert written["gateways"] == list(stack.gateway_addresses)
        assert written["nats"] == stack.nats_url
        assert written["pids"] == {name: stack.part(name).pid for name in stack.part_names}
        for address in stack.gateway_addresses:
            assert await asyncio.to_thread(echo, address) == {"n": 1.0}
        for name in stack.part_names:
            before = stack.part(name).pid
            await stack.kill(name)
            await stack.wait_ready(name)
            assert stack.part(name).pid != before
        for address in stack.gateway_addresses:  # the same addresses as before
            await until_serving(address)
            assert await asyncio.to_thread(echo, address) == {"n": 1.0}
    assert not state_dir.exists()
    assert not processes_of(state_dir)


async def until_serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30)
        async for answer in watching:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
        watching.cancel()


async def test_triton_is_part_of_it_and_leaves_no_shared_memory() -> None:
    before = shared_memory()
    async with Stack(configuration(), workers=[("infer", "home")]) as stack:
        state_dir = stack.state_dir
        assert await probes.triton_ready(stack.triton_url)
        assert shared_memory() - before
        await stack.kill("triton")
        await stack.wait_ready("triton")
        assert await probes.triton_ready(stack.triton_url)
        # what exists is used, not started
        config = configuration(nats={"urls": [stack.nats_url]}, triton={"url": stack.triton_url})
        async with Stack(config, workers=[("infer", "home")]) as other:
            assert other.part_names == ("infer-home", "gateway")
            assert (other.nats_url, other.triton_url) == (stack.nats_url, stack.triton_url)
    assert not processes_of(state_dir)
    assert shared_memory() <= before


@pytest.mark.parametrize("model", ["echo", "tokens"])
async def test_a_model_whose_process_was_killed_works_again(model: str) -> None:
    """As after an OOM kill: Triton starts no other process for it and calls itself ready as before."""
    lines: list[str] = []
    async with Stack(configuration(), on_line=lines.append, workers=[("infer", "home")]) as stack:
        ask = ("infer", model, "--input", '{"text": "one", "delay_ms": 1}', "--timeout", "60", "--address", stack.gateway_address)
        assert (await asyncio.to_thread(nearloop, "execute", *ask)).returncode == 0
        server = psutil.Process(stack.part("triton").pid)
        (stub,) = [child for child in server.children() if f"/{model}/" in " ".join(child.cmdline())]
        held = asyncio.create_task(asyncio.to_thread(nearloop, "execute", *HELD, "--address", stack.gateway_address))
        stub.kill()
        executed, submitted = await asyncio.gather(*(asyncio.to_thread(nearloop, command, *ask) for command in ("execute", "submit")))
        assert executed.returncode == 0, executed.stderr
        assert submitted.returncode == 0, submitted.stderr
        watched = await asyncio.to_thread(nearloop, "watch", submitted.stdout.split()[0], "--address", stack.gateway_address)
        assert watched.returncode == 0, watched.stderr
        assert (await held).returncode == 0, "a step of another model survives the restart"
        assert stack.part("triton").restarts == 1
        (said,) = [line for line in lines if line.startswith("triton was killed")]
        assert f"the process of model instance {model}_0_0 has died; starting it again in" in said


async def test_a_model_that_does_not_load_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "broken"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text("raise RuntimeError('no weights here')\n")
    (folder / "config.pbtxt").write_text('name: "broken"\nbackend: "python"\n')
    with pytest.raises(PartFailed, match=r"^triton .*model 'broken'.*no weights here") as caught:
        async with Stack(configuration(triton={"repository": str(tmp_path / "models")})):
            pytest.fail("it must not be called ready")
    assert "\n" not in str(caught.value)


async def test_a_state_directory_survives_and_is_used_once(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    async with Stack(configuration(), state_dir=state_dir, triton=False) as stack:
        job = await asyncio.to_thread(nearloop, *"submit tool echo --key k1 --address".split(), stack.gateway_address)
        assert job.returncode == 0, job.stderr
        with pytest.raises(PartFailed, match="is in use by another `nearloop up`"):
            await Stack(configuration(), state_dir=state_dir, triton=False).__aenter__()
    async with Stack(configuration(), state_dir=state_dir, triton=False) as stack:
        again = await asyncio.to_thread(nearloop, *"submit tool echo --key k1 --address".split(), stack.gateway_address)
        assert again.stdout == job.stdout
        assert again.stderr.startswith("was there already")
    assert (state_dir / "logs" / "gateway.log").exists()
    assert not processes_of(state_dir)


async def test_a_gateway_port_in_use_is_noticed_before_anything_starts() -> None:
    port = addresses.free_port()
    config = configuration(gateway={"listen": f"127.0.0.1:{port}"})
    with addresses.listening(port), pytest.raises(addresses.PortInUse, match=f"port {port} .* in use.*--listen"):
        await Stack(config, triton=False).__aenter__()


def test_which_workers_there_are() -> None:
    regions = [{"name": "home"}, {"name": "iad"}]
    tools = [("tool", "home"), ("tool", "iad")]
    runs = [("run", "home"), ("run", "iad")]
    config = configuration(regions=regions, triton={"region": "iad"})
    assert default_workers(config) == [("infer", "iad"), *tools, *runs]
    assert default_workers(config, triton=False) == [*tools, *runs]
    assert default_workers(parse({})) == [("infer", "home"), ("run", "home")]


@pytest.mark.parametrize(("url", "where"), [("", ["iad"]), ("http://qdrant:6333", ["home", "iad"])])
def test_an_embedded_vector_store_has_one_worker(url: str, where: list[str]) -> None:
    config = configuration(
        regions=[{"name": "home"}, {"name": "iad"}],
        targets=[{"kind": "retrieve", "name": "docs", "home_region": "iad"}],
        retrieve={"url": url, "collections": [{"name": "docs"}]},
    )
    assert [region for kind, region in default_workers(config) if kind == "retrieve"] == where


@contextmanager
def up(tmp_path: Path, *argv: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`nearloop up`, and its lines until it says that it is ready. Its temporary directory lies in tmp_path."""
    command = [sys.executable, "-P", "-m", "gateway.cli", "up", "--no-triton", "--listen", "127.0.0.1:0", *argv]
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            lines: list[str] = []
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if line.startswith("ready:"):
                    break
            yield process, lines
        finally:
            process.kill()


def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    with up(tmp_path) as (process, lines):
        assert processes_of(tmp_path)
        address = lines[-1].split("gateway ")[1].split(",")[0]
        assert echo(address) == {"n": 1.0}
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert rest.splitlines()[-1] == "stopped"
    assert not processes_of(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_killed_supervisor_leaves_nothing(tmp_path: Path) -> None:
    with up(tmp_path) as (process, _):
        assert processes_of(tmp_path)
        (guard,) = [child for child in psutil.Process(process.pid).children() if "guard.py" in " ".join(child.cmdline())]
        guard_fd = os.pidfd_open(guard.pid)
        process.kill()
    select.select([guard_fd], [], [], 30)  # readable when the guard has done its work and ended
    os.close(guard_fd)
    assert not processes_of(tmp_path)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_it_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "gateway.cli", "up", "--listen", "127.0.0.1:0"]
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("nats "):  # Triton takes longer
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "ready:" not in rest
    assert not processes_of(tmp_path)
    assert not list(tmp_path.iterdir())

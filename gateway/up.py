"""A whole stack on one machine: nats-server, Triton, workers and gateways, supervised. `nearloop up`, the demo and the tests use it."""

import fcntl
import json
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway import addresses, parts, private_files, regions_up, toml_writer
from gateway.config import Config
from gateway.guard import Guard
from gateway.parts import default_workers
from gateway.supervised import Supervised
from gateway.supervisor import Part, PartFailed, Supervisor, interrupts

__all__ = ["Ports", "Stack", "default_workers", "interrupts"]


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of the servers that are started; 0 is any free one. Of several nats-servers they are the first one's."""

    nats: int = 0
    nats_monitoring: int = 0
    triton: int = 0
    triton_http: int = 0
    triton_metrics: int = 0


class Stack:
    """`async with Stack(config) as stack:` is ready inside and leaves nothing behind after it.

    workers are (kind, region) pairs; None means default_workers(config, triton). Servers whose urls the configuration names are used,
    not started. extra parts without `after` start first, others last. Without a state_dir everything is kept in a temporary
    directory, which is removed at the end. on_line gets one line of text for everything that a person should see.

    regions: each of these gets a nats-server of its own, `nats-<region>`; the first one is the gateway's and takes the connections of the
    others. Without it all regions share one, `nats`. wan: simulated round trips to the first region, seconds, by region: a relay,
    `wan-<region>`, stands on the way, which can be cut.
    Raises PartFailed for regions that cannot be; entering raises PartFailed, PortInUse.
    """

    def __init__(
        self,
        config: Config,
        *,
        state_dir: Path | None = None,
        on_line: Callable[[str], None] = lambda line: None,
        gateways: int = 1,
        workers: Sequence[tuple[str, str]] | None = None,
        triton: bool = True,
        extra: Sequence[Part] = (),
        ports: Ports = Ports(),
        regions: Sequence[str] = (),
        wan: Mapping[str, float] = {},
    ) -> None:
        if regions:
            config = regions_up.with_regions(config, regions)
        regions_up.check_wan(regions, wan)
        self._asked = config
        self._regions, self._wan = tuple(regions), wan
        self._servers: regions_up.RegionServers | None = None
        self._wanted_dir = state_dir
        self._on_line = on_line
        self._gateways = gateways
        self._with_triton = triton
        self._workers = list(workers) if workers is not None else default_workers(config, triton)
        self._extra = extra
        self._ports = ports
        self._shm_prefix = f"nearloop-{secrets.token_hex(4)}-"
        self._lock = -1
        self._monitoring_url = ""
        self._running: Supervisor | None = None
        self.config = config  # the effective one, once entered
        self.state_dir = Path()
        self.gateway_addresses: tuple[str, ...] = ()

    @property
    def gateway_address(self) -> str:
        return self.gateway_addresses[0]

    @property
    def nats_url(self) -> str:
        """With the password or token that it needs: not for people to see."""
        urls = self.config.nats_urls(self.config.gateway.region)
        return urls[0] if urls else ""

    @property
    def nats_urls(self) -> Mapping[str, str]:
        """By region; empty when the regions have no servers of their own. With the tokens that they need."""
        return {server.region: server.url for server in self._servers.servers} if self._servers else {}

    async def linked(self) -> frozenset[str]:
        """The regions with which the first region's server has a connection, as far as it has noticed. Raises OSError, TimeoutError."""
        return await self._servers.linked() if self._servers else frozenset()

    def cut(self, region: str) -> None:
        """The way between the region and the first one falls silent: nothing arrives any more, and nobody is told. Raises KeyError without
        a relay on it, see `wan`."""
        self._signal_relay(region, signal.SIGUSR1)

    def hang_up(self, region: str) -> None:
        """The connection between the region and the first one is reset, and so is each new one. Raises KeyError."""
        self._signal_relay(region, signal.SIGHUP)

    def heal(self, region: str) -> None:
        """Ends cut and hang_up; what was held on the way arrives. Raises KeyError."""
        self._signal_relay(region, signal.SIGUSR2)

    def _signal_relay(self, region: str, number: signal.Signals) -> None:
        if pid := self.part(f"wan-{region}").pid:  # one that starts again is whole
            os.kill(pid, number)

    @property
    def triton_url(self) -> str:
        """Empty without Triton; with several, all of them with commas between."""
        return ",".join(self.config.triton.addresses)

    @property
    def config_file(self) -> Path:
        return self.state_dir / "nearloop.toml"

    @property
    def nats_url_file(self) -> Path:
        """For operators: `export NATS_URL="$(cat FILE)"`. In an argument every user of the machine could read the token."""
        return self.state_dir / "nats.url"

    @property
    def _supervisor(self) -> Supervisor:
        if self._running is None:
            raise RuntimeError("the stack has not been entered")
        return self._running

    @property
    def part_names(self) -> tuple[str, ...]:
        return self._supervisor.names

    def part(self, name: str) -> Supervised:
        """Its pid, its log, how often it was restarted. Raises KeyError."""
        return self._supervisor.part(name)

    async def kill(self, name: str) -> None:
        """SIGKILL, as from outside; returns when the end was noticed. The part is started again."""
        await self._supervisor.part(name).kill()

    async def wait_ready(self, name: str) -> None:
        await self._supervisor.part(name).ready.wait()

    def kill_now(self) -> None:
        """SIGKILL for everything, for a person without patience."""
        if self._running is not None:
            self._running.kill_now()

    async def __aenter__(self) -> Self:
        """Raises PartFailed, PortInUse."""
        parts.check_python()
        self._guard = Guard()
        try:
            self._open_state_dir()
            self._running = Supervisor(await self._prepare(), self.state_dir / "logs", self._guard, self._on_line)
        except BaseException:
            self._close_state_dir()
            self._guard.close()
            raise
        try:
            await self._supervisor.start()
            if self._servers is not None:
                await self._servers.until_linked()
        except BaseException:
            await self._stop()
            raise
        self._write_addresses()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    async def _stop(self) -> None:
        try:
            await self._supervisor.stop()
        finally:
            self._close_state_dir()
            self._guard.close()

    def _open_state_dir(self) -> None:
        if self._wanted_dir is None:
            self.state_dir = Path(tempfile.mkdtemp(prefix="nearloop-"))
            self._guard.remove(self.state_dir)
        else:
            self.state_dir = self._wanted_dir.absolute()
            try:
                self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                owner = self.state_dir.stat().st_uid
            except OSError as error:
                raise PartFailed(f"the state directory {self.state_dir} cannot be made: {error.strerror}") from error
            if owner != os.geteuid():  # who could exchange the files in it
                raise PartFailed(f"the state directory {self.state_dir} belongs to another user: name another --state-dir")
        self._guard.remove_shared_memory(self._shm_prefix)
        self._lock = os.open(self.state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PartFailed(f"{self.state_dir} is in use by another `nearloop up`: stop that or name another --state-dir") from None
        for folder in ("logs", "ready"):
            private_files.folder(self.state_dir / folder)

    def _close_state_dir(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._wanted_dir is None and self.state_dir != Path():
            shutil.rmtree(self.state_dir, ignore_errors=True)

    async def _prepare(self) -> list[Part]:
        """The parts in the order of their dependencies; settles self.config and writes it down for them."""
        config, ports = self._asked, self._ports
        servers: list[Part] = []
        if self._regions:
            self._servers = regions_up.prepare(self.state_dir, self._regions, self._wan, ports.nats, ports.nats_monitoring)
            config = self._servers.configured(config)
            servers += self._servers.parts
            self._monitoring_url = self._servers.servers[0].monitoring_url
        elif urls := config.nats_urls(config.gateway.region):
            await parts.check_existing_nats(urls)
        else:
            monitoring_port = addresses.choose(ports.nats_monitoring, "--nats-http-port")
            nats_port, token = addresses.choose(ports.nats, "--nats-port"), secrets.token_hex(24)
            servers.append(parts.nats_part("nats", self.state_dir, nats_port, monitor_port=monitoring_port, token=token))
            urls = (f"nats://{token}@127.0.0.1:{nats_port}",)
            self._monitoring_url = f"http://127.0.0.1:{monitoring_port}"
            config = config.model_copy(update={"nats": config.nats.model_copy(update={"urls": urls})})
        if config.triton.addresses and self._with_triton:
            await parts.check_existing_triton(config.triton.addresses)
        elif self._with_triton:
            triton = parts.triton_part(
                self.state_dir,
                config.triton.repository,
                addresses.choose(ports.triton, "--triton-port"),
                addresses.choose(ports.triton_http, "--triton-http-port"),
                addresses.choose(ports.triton_metrics, "--triton-metrics-port"),
                self._shm_prefix,
            )
            config = config.model_copy(update={"triton": config.triton.model_copy(update={"url": triton.address})})
            servers.append(triton)
        host, port = addresses.split(config.gateway.listen)
        chosen = [addresses.choose(port if index == 0 else 0, "--listen", host) for index in range(self._gateways)]
        self.gateway_addresses = tuple(f"{config.gateway.listen.rpartition(':')[0]}:{number}" for number in chosen)
        if chosen:
            config = config.model_copy(update={"gateway": config.gateway.model_copy(update={"listen": self.gateway_addresses[0]})})
        self.config = config
        private_files.write(self.config_file, toml_writer.dumps(self.config.model_dump(mode="json")))
        first = [part for part in self._extra if not part.after]
        last = [part for part in self._extra if part.after]
        return [*first, *servers, *self._own_parts(tuple(part.name for part in servers), tuple(p.name for p in first)), *last]

    def _own_parts(self, servers: tuple[str, ...], extra: tuple[str, ...]) -> list[Part]:
        config = self.config
        brokers = {region: tuple(name for name in servers if name in ("nats", f"nats-{region}")) for region in config.region_names}
        workers: list[Part] = []
        for kind, region in self._workers:
            name = base = f"{kind}-{region}"
            count = 1
            while name in {part.name for part in workers}:
                count += 1
                name = f"{base}-{count}"
            ready_file = self.state_dir / "ready" / name
            grace_s = config.worker.drain_s + 5
            workers.append(
                parts.worker_part(name, kind, region, self.config_file, ready_file, brokers[region], (*servers, *extra), grace_s)
            )
        names = tuple(part.name for part in workers)
        gateways, broker = [], brokers[config.gateway.region]
        for index, address in enumerate(self.gateway_addresses):
            name = "gateway" if index == 0 else f"gateway-{index + 1}"
            gateways.append(parts.gateway_part(name, self.config_file, address, broker, names, config.gateway.drain_s + 5))
        return [*workers, *gateways]

    def _write_addresses(self) -> None:
        document = {
            "gateway": self.gateway_address if self.gateway_addresses else "",
            "gateways": self.gateway_addresses,
            "nats": self.nats_url,
            "nats_monitoring": self._monitoring_url,
            "triton": self.triton_url,
            "config": str(self.config_file),
            "regions": {
                server.region: {"nats": server.url, "nats_monitoring": server.monitoring_url}
                for server in (self._servers.servers if self._servers else ())
            },
            "pids": {name: self.part(name).pid for name in self.part_names},
        }
        private_files.write(self.state_dir / "addresses.json", json.dumps(document, indent=2) + "\n")
        private_files.write(self.nats_url_file, f"{self.nats_url}\n")
        for region, url in self.nats_urls.items():
            private_files.write(self.state_dir / f"nats-{region}.url", f"{url}\n")

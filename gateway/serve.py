"""The composition root of a gateway process: configuration -> plugins -> bus -> kernel -> gRPC, and an orderly end."""

import asyncio
import gc
import logging
import os
import random
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from gateway import __version__, loader
from gateway.clock import Clock, SystemClock
from gateway.config import Config
from gateway.core.containment import Containment, Report
from gateway.edge.bus import NatsGatewayBus
from gateway.edge.ingress import Ingress
from gateway.edge.policy_bucket import PolicyBucket
from gateway.edge.run_store import NatsRunStore
from gateway.edge.service import ServiceEndpoint, ServiceResponder
from gateway.edge.telemetry import StepTracer, build_provider, shut_down
from gateway.kernel import Kernel
from gateway.live_policies import LivePolicies
from gateway.policy import Named, Slot
from gateway.runs import Runs

log = logging.getLogger(__name__)
CHECK_TRANSPORT_S = 0.5
LOG_FAULT_S = 10.0


def default_name(role: str) -> str:
    """A name that is an id and tells machine and process."""
    host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())[:32]
    return f"{role}-{host}-{os.getpid()}"


def tune_collector() -> None:
    """What start-up made stays: the cycle collector need not look at it again, nor at every few hundred steps in flight."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def log_fault(clock: Clock) -> Report:
    """Logs what goes wrong with a policy, each policy at most every LOG_FAULT_S: one that fails with every step must not fill the log."""
    said: dict[str, tuple[float, int]] = {}  # when a policy was named last, and how often it was not since then

    def report(named: Named, what: str) -> None:
        last_s, unsaid = said.get(named.name, (float("-inf"), 0))
        if clock.now_s() - last_s < LOG_FAULT_S:
            said[named.name] = (last_s, unsaid + 1)
            return
        said[named.name] = (clock.now_s(), 0)
        more = f" (and {unsaid} times more since this was said last)" if unsaid else ""
        log.error("policy %s (%s): %s; going on as on_error = %s says%s", named.name, named.slot, what, named.on_error, more)

    return report


async def run_gateway(config: Config, *, port_file: str | None = None, stop: asyncio.Event | None = None) -> None:
    """Serves until SIGTERM or SIGINT (or `stop`), then refuses new calls, drains for gateway.drain_s and closes.

    port_file, when given, gets the bound address once the gateway serves. Raises ConfigError, TopologyMismatch, Unavailable.
    """
    stopping = stop or _stop_on_signals()
    name = config.gateway.name or default_name("gateway")
    clock, manager = SystemClock(), loader.find_plugins(config)
    policies, contain = loader.build_policies(config, manager), Containment(log_fault(clock), clock.now_s)
    provider = build_provider(config.telemetry, "gateway", name)
    tracer = StepTracer(provider, policies.all(Slot.HEAD_SAMPLING), contain, clock, random.random)
    bus = NatsGatewayBus(config, name, clock)
    kernel = Kernel(config, policies, bus, clock, random.random, tracer, contain, loader.plugin_targets(config, manager))
    runs = Runs(config, kernel, bus, NatsRunStore(bus.js_of, config.gateway.region, clock), clock, random.random)
    ingress = Ingress(config, kernel, clock, bus.new_id, runs=runs)
    live = LivePolicies(policies, lambda: kernel.permits.fill(clock.now_s()))
    bucket = PolicyBucket(bus.js, name, live.change)
    await bus.start()
    try:
        await bucket.start()
        port = await ingress.start()
        address = f"{config.gateway.listen.rpartition(':')[0]}:{port}"
        responder = ServiceResponder(
            bus.control,
            name="nearloop-gateway",
            instance_id=name,
            version=__version__,
            description="takes agent steps over gRPC",
            metadata={"region": config.gateway.region, "address": address},
            endpoints=lambda: _endpoints(kernel),
        )
        await responder.start()
        tune_collector()
        ingress.set_serving(True)
        manager.hook.nearloop_started(role="gateway", name=name)
        if port_file:
            Path(port_file).write_text(address)
        log.info("gateway %s serves on %s", name, address)
        watcher = asyncio.create_task(_follow_transport(bus, ingress))
        await stopping.wait()
        log.info("gateway %s drains", name)
        manager.hook.nearloop_stopping(role="gateway", name=name)
        watcher.cancel()
        ingress.set_serving(False)
        await ingress.stop(config.gateway.drain_s)
        await responder.stop()
        await runs.close()
        await kernel.close()
    finally:
        await bucket.close()
        await bus.close()
        await shut_down(provider)


async def _follow_transport(bus: NatsGatewayBus, ingress: Ingress) -> None:
    """Health says NOT_SERVING while the transport is gone, so that balancers choose another gateway."""
    serving = True
    while True:
        await asyncio.sleep(CHECK_TRANSPORT_S)
        if bus.connected != serving:
            serving = bus.connected
            ingress.set_serving(serving)
            log.warning("transport is %s", "back" if serving else "gone: health is NOT_SERVING until it is back")


def _endpoints(kernel: Kernel) -> Sequence[ServiceEndpoint]:
    """What `nats service stats` shows of a gateway: the steps, by how they ended, and what its policies did."""
    failed = sum(count for state, count in kernel.counts.items() if state != "done")
    policies: dict[str, dict[str, int]] = {}
    for (policy, event), count in sorted(kernel.contain.counts.items()):
        policies.setdefault(policy, {})[event] = count
    data = {"states": dict(kernel.counts), "policies": policies, "gates": kernel.permits.gates()}
    return [ServiceEndpoint("steps", "nl.step.>", kernel.counts["done"] + failed, failed, kernel.service_ns, "", data)]


def _stop_on_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    return stopping

"""The composition root of a worker process: configuration -> plugins -> bus -> executor -> runtime, and an orderly end.

python -P -m workers.serve --kind tool --region home --config nearloop.toml
"""

import argparse
import asyncio
import logging
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pluggy
import uvloop

from gateway import __version__, loader
from gateway.clock import Clock, SystemClock
from gateway.config import Config, load
from gateway.core.containment import Containment
from gateway.core.policies import PolicySet
from gateway.edge.bus import NatsGatewayBus
from gateway.edge.policy_bucket import PolicyBucket
from gateway.edge.service import ServiceResponder
from gateway.edge.telemetry import StepTracer, build_provider, shut_down
from gateway.edge.worker_bus import NatsWorkerBus
from gateway.errors import ConfigError, NearloopError
from gateway.kernel import Kernel
from gateway.live_policies import LivePolicies
from gateway.policy import Slot
from gateway.ports import Executor, Queue
from gateway.serve import default_name, log_fault, tune_collector
from gateway.types import Kind, StepResult
from workers.batching import Batching
from workers.catalogue import merge_target
from workers.held import Held
from workers.inner import InnerCalls
from workers.measure import Measuring, start_measuring
from workers.runtime import WorkerRuntime
from workers.stats import WorkerStats

log = logging.getLogger("nearloop.worker")


class _Inner:
    """A kernel of this process's own, for the steps that its executor needs."""

    def __init__(
        self,
        config: Config,
        name: str,
        region: str,
        clock: Clock,
        manager: pluggy.PluginManager,
        policies: PolicySet,
        make_bus: Callable[[Config, str, Clock], NatsGatewayBus],
    ) -> None:
        contain = Containment(log_fault(clock), clock.now_s)
        tracer = StepTracer(None, policies.all(Slot.HEAD_SAMPLING), contain, clock, random.random)
        config = config.model_copy(update={"gateway": config.gateway.model_copy(update={"region": region})})
        self.config = config
        self.bus = make_bus(config, f"{name}-inner", clock)
        targets = loader.plugin_targets(config, manager)
        self.kernel = Kernel(config, policies, self.bus, clock, random.random, tracer, contain, targets)
        self._clock = clock
        self.calls = InnerCalls(self.kernel, region, self.bus.new_id)

    def fill(self) -> None:
        self.kernel.permits.fill(self._clock.now_s())

    async def start(self) -> None:
        await self.bus.start()

    async def close(self) -> None:
        await self.kernel.close()
        await self.bus.close()


def _build_executor(
    config: Config,
    kind: Kind,
    region: str,
    name: str,
    clock: Clock,
    manager: pluggy.PluginManager,
    inner: Callable[[], _Inner],
    batching: Batching | None,
    observers: list[Callable[[Held, StepResult | None], None]],
) -> Executor:
    """A plugin's, else the built-in one. Raises ConfigError for a kind that nothing executes.

    Imports only what the kind needs: a tool worker has no use for a vector store's half second.
    """
    brought: Executor | None = manager.hook.nearloop_executor(kind=kind, config=config, region=region)
    if brought is not None:
        return brought
    if kind is Kind.INFER:
        from workers.triton import TritonExecutor

        return TritonExecutor(config, region, batching=batching)
    if kind is Kind.TOOL:
        from workers.tools import ToolsExecutor

        return ToolsExecutor(config)
    if kind is Kind.RETRIEVE:
        from workers.embedding import TensorEmbedder
        from workers.retrieve import RetrieveExecutor

        calls = inner().calls
        model = next((section.embed_target for section in config.retrieve.collections), "embed")
        return calls.wrap(RetrieveExecutor(config, TensorEmbedder(lambda payload: calls.infer(model, payload)), calls=calls))
    if kind is Kind.RUN:
        from workers.run_parts import RunParts

        own = inner()
        runs = RunParts(own.config, name, own.bus, own.kernel, clock, random.random)
        observers.append(runs.observe)
        return runs
    raise ConfigError("worker", [f"nothing here executes steps of kind {kind.value}: a plugin must bring nearloop_executor"])


def _near_bus(name: str) -> Callable[[Config, str, Clock], NatsGatewayBus]:
    from workers.near import NearBus, NearTools

    return lambda config, bus_id, clock: NearBus(config, bus_id, clock, NearTools(config, name, clock))


def _build_batching(config: Config, policies: PolicySet) -> Batching | None:
    """None without a policy for it: each step is sent at once."""
    if not policies.entries.get(Slot.BATCHING):
        return None
    return Batching(
        lambda: policies.all(Slot.BATCHING), lambda target: merge_target(config.target_section(target.kind, target.name), target).slots
    )


async def run_worker(
    config: Config, kind: Kind, region: str, *, name: str = "", ready_file: str | None = None, stop: asyncio.Event | None = None
) -> None:
    """Serves until SIGTERM or SIGINT (or `stop`), then drains; a second signal lets the drain wait no longer.

    ready_file, when given, is written once the worker pulls. Raises ConfigError, TopologyMismatch, Unavailable.
    """
    if region not in config.region_names:
        raise ConfigError("worker", [f"there is no region {region!r} in [[regions]]: it has {', '.join(config.region_names)}"])
    name = name or default_name(kind.value)
    stopping = stop or asyncio.Event()
    clock, manager = SystemClock(), loader.find_plugins(config)
    policies = loader.build_policies(config, manager)
    inner: list[_Inner] = []

    def make_inner() -> _Inner:
        make_bus = _near_bus(name) if kind is Kind.RUN and config.worker.near_calls and config.tools.http else NatsGatewayBus
        inner.append(_Inner(config, name, region, clock, manager, policies, make_bus))
        return inner[0]

    stats = WorkerStats(kind, region)
    observers: list[Callable[[Held, StepResult | None], None]] = [stats.observe]

    def observe(held: Held, result: StepResult | None) -> None:
        for one in observers:
            one(held, result)

    batching = _build_batching(config, policies) if kind is Kind.INFER else None
    executor = _build_executor(config, kind, region, name, clock, manager, make_inner, batching, observers)
    measured = executor  # itself, and not what wraps it
    provider = build_provider(config.telemetry, "worker", name)
    if provider is not None:
        from workers.tracing import TracedExecutor

        executor = TracedExecutor(executor, provider, region, name)
    bus = NatsWorkerBus(config, name, region, clock)

    def look_again() -> None:
        for one in inner:
            one.fill()

    live = LivePolicies(policies, look_again)
    bucket = PolicyBucket(bus.js, name, live.change)
    learnt = batching.learnt if batching is not None else dict

    def has_runners(queue: Queue) -> bool:
        """A run goes to a runner far away only when its region has none: that one could be cut off from the run's journal."""
        scope = f"{queue.kind.value}.{queue.target}"
        return any(
            worker.region == queue.region and scope in worker.targets and not worker.draining
            for one in inner
            for worker in one.bus.workers()
        )

    runtime = WorkerRuntime(
        config,
        kind,
        region,
        name,
        bus,
        executor,
        clock=clock,
        observe=observe,
        batch_costs=learnt,
        is_taken_care_of=has_runners if kind is Kind.RUN else lambda queue: False,
    )
    measuring: Measuring | None = None
    if stop is None:
        _drain_on_signals(stopping, runtime)
    try:
        if not await _started(runtime, inner, stopping):
            return
        await bucket.start()
        responder = ServiceResponder(
            bus.control,
            name=f"nearloop-{kind.value}",
            instance_id=name,
            version=__version__,
            description=f"executes {kind.value} steps",
            metadata={"region": region, "kind": kind.value},
            endpoints=lambda: stats.endpoints(runtime.targets()),
        )
        await responder.start()
        measuring = await start_measuring(kind, region, config.region_names, bus, measured, clock)
        manager.hook.nearloop_started(role="worker", name=name)
        tune_collector()
        if ready_file:
            Path(ready_file).write_text(name)
        log.info("%s worker %s is ready in region %s: %s", kind.value, name, region, ", ".join(runtime.info().targets))
        await stopping.wait()
        log.info("%s worker %s drains", kind.value, name)
        manager.hook.nearloop_stopping(role="worker", name=name)
        await runtime.drain()
        await responder.stop()
    finally:
        if measuring is not None:
            await measuring.close()
        await bucket.close()
        await runtime.close()
        for one in inner:
            await one.close()
        await shut_down(provider)
        log.info("%s worker %s has stopped", kind.value, name)


async def _started(runtime: WorkerRuntime, inner: list[_Inner], stopping: asyncio.Event) -> bool:
    """False when it was told to stop before it was ready, which can take as long as Triton loads its models."""

    async def start() -> None:
        for one in inner:
            await one.start()
        await runtime.start()

    starting = asyncio.create_task(start())
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    return False


def _drain_on_signals(stopping: asyncio.Event, runtime: WorkerRuntime) -> None:
    def on_signal() -> None:
        if stopping.is_set():
            runtime.hurry()
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 after a drain, 1 when a part is not reachable, 2 for a mistake in configuration or topology."""
    parser = argparse.ArgumentParser(prog="workers.serve", description="Runs one worker until SIGTERM.")
    parser.add_argument("--kind", required=True, type=Kind, choices=list(Kind), metavar="{infer,tool,retrieve,run}")
    parser.add_argument("--region", required=True)
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--name", default="", help="default: made from kind, host and process")
    parser.add_argument("--ready-file", metavar="FILE", help="written once the worker pulls")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = load(options.config)
        uvloop.run(run_worker(config, options.kind, options.region, name=options.name, ready_file=options.ready_file))
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except NearloopError as error:
        log.error("%s worker: %s", options.kind.value, error.message)
        return 2 if error.code == "FAILED_PRECONDITION" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

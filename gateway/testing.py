"""What tests need, shipped for plugin authors: a clock that a test moves, a bus in memory, a kernel over both.

    clock = ManualClock()
    bus = MemoryBus(Config(), clock)
    kernel = make_kernel(bus, clock, plugins=["my_policies.lane_guard"], policies=[{"use": "lane_guard"}])

The bus passes the same contract tests as the one on NATS.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gateway import loader
from gateway.clock import Clock
from gateway.config import parse
from gateway.core.containment import Containment
from gateway.kernel import Kernel
from gateway.policy import Named
from gateway.testing_bus import MemoryBus
from gateway.testing_clock import ManualClock
from gateway.types import Flow, Step

__all__ = ["ManualClock", "MemoryBus", "NoTracer", "make_kernel"]


class NoTracer:
    """A `Tracer` that records nothing."""

    def start(self, step: Step, flow: Flow) -> tuple[Step, object]:
        return step, None

    def end(self, span: object, error: BaseException | None) -> None:
        pass


def make_kernel(
    bus: MemoryBus,
    clock: Clock,
    *,
    policies: Sequence[Mapping[str, Any]] = (),
    plugins: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    random: float = 0.5,
) -> Kernel:
    """A kernel with these `[[policies]]` and no others; `random` is every random number.

    What happened to policies is in `kernel.contain.counts`.

    settings are further sections of the configuration. Raises ConfigError.
    """
    config = parse({**(settings or {}), "policies": list(policies), "plugins": list(plugins)})
    manager = loader.find_plugins(config)
    built = loader.build_policies(config, manager)
    contain = Containment(_forget, clock.now_s)
    targets = loader.plugin_targets(config, manager)
    return Kernel(config, built, bus.gateway(), clock, lambda: random, NoTracer(), contain, targets)


def _forget(named: Named, what: str) -> None:
    """Counted is enough in a test."""

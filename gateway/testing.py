"""What tests need, shipped for plugin authors: a clock that a test moves and a bus in memory.

    clock = ManualClock()
    bus = MemoryBus(Config(), clock)
    gateway, worker = bus.gateway(), bus.worker("w1", "home")

The bus passes the same contract tests as the one on NATS.
"""

from gateway.testing_bus import MemoryBus
from gateway.testing_clock import ManualClock

__all__ = ["ManualClock", "MemoryBus"]

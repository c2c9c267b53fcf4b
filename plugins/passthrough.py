"""Question: does a worker wait to fill a batch?

Never: every step goes to the model server at once, and the server's own dynamic batcher batches. Right for models that have one. No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import BatchView, PolicyType, Slot, hookimpl


@dataclass(frozen=True)
class PassthroughConfig:
    """Nothing to set."""


class Passthrough:
    def __init__(self, config: PassthroughConfig) -> None:
        pass

    def wait_s(self, view: BatchView, now_s: float) -> float:
        return 0.0

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        """Nothing to learn."""


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("passthrough", Slot.BATCHING, PassthroughConfig, Passthrough, "no waiting: the model server batches")]

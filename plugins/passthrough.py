"""Question: does a worker wait to fill a batch?

Never: what is there goes to the model server at once. Right for models whose server has a batcher of its own, as Triton's dynamic
batcher, and for those that take no batches; by default it serves just these. No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import BatchCost, BatchView, ModelView, PolicyType, Slot, hookimpl


@dataclass(frozen=True)
class PassthroughConfig:
    """models: it serves these; without any, those whose model server batches for them, or that take no batches."""

    models: tuple[str, ...] = ()


class Passthrough:
    def __init__(self, config: PassthroughConfig) -> None:
        self._config = config

    def reconfigure(self, config: PassthroughConfig) -> None:
        self._config = config

    def serves(self, model: ModelView) -> bool:
        if self._config.models:
            return model.name in self._config.models
        return model.server_batches or model.max_batch_size <= 1

    def wait_s(self, view: BatchView, now_s: float) -> float:
        return 0.0

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        """Nothing to learn."""

    def learnt(self) -> BatchCost | None:
        return None


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("passthrough", Slot.BATCHING, PassthroughConfig, Passthrough, "no waiting: the model server batches")]

"""Question: is the batch large enough, or has its first step waited long enough?

The rule of most batchers (Triton's `preferred_batch_size` and `max_queue_delay_microseconds`, TensorFlow Serving's `batch_timeout_micros`):
a batch goes when it has `size` rows or its oldest step has waited `delay_s`. It knows neither load nor cost, so size and delay are right
for one load. No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import BatchCost, BatchView, ModelView, PolicyType, Slot, hookimpl


@dataclass(frozen=True)
class FixedWindowConfig:
    """size 0 is the model's largest. models: it serves these; without any, those whose model server has no batcher for them."""

    size: int = 0
    delay_s: float = 0.005
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size must be 0, for the model's largest, or more")
        if not 0 <= self.delay_s <= 60:
            raise ValueError("delay_s must be from 0 to 60")


class FixedWindow:
    def __init__(self, config: FixedWindowConfig) -> None:
        self._config = config

    def reconfigure(self, config: FixedWindowConfig) -> None:
        self._config = config

    def serves(self, model: ModelView) -> bool:
        if self._config.models:
            return model.name in self._config.models
        return model.max_batch_size > 1 and not model.server_batches

    def wait_s(self, view: BatchView, now_s: float) -> float:
        if view.size >= (self._config.size or view.max_size):
            return 0.0
        return max(0.0, self._config.delay_s - view.oldest_wait_s)

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        """Nothing to learn."""

    def learnt(self) -> BatchCost | None:
        return None


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("fixed_window", Slot.BATCHING, FixedWindowConfig, FixedWindow, "waits until a size or a delay is reached")]

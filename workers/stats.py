"""Counters of a worker for each target, as `nats service stats` shows them."""

from collections import Counter
from collections.abc import Sequence

from gateway.edge.service import ServiceEndpoint
from gateway.types import Kind, Status, StepResult, Target
from workers.held import Held


class WorkerStats:
    """Counts results; a step that went back to its queue is counted by the worker that ends it."""

    def __init__(self, kind: Kind, region: str) -> None:
        self._kind = kind
        self._region = region
        self._requests: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._service_ns: Counter[str] = Counter()
        self._last_error: dict[str, str] = {}

    def observe(self, held: Held, result: StepResult | None) -> None:
        if result is None:
            return
        name = held.step.target
        self._requests[name] += 1
        self._service_ns[name] += result.service_us * 1000
        if result.status is not Status.DONE:
            self._errors[name] += 1
            self._last_error[name] = f"{result.code} {result.reason}"  # the message may quote the input

    def endpoints(self, targets: Sequence[Target]) -> list[ServiceEndpoint]:
        return [
            ServiceEndpoint(
                name,
                f"nl.step.{self._region}.{self._kind.value}.{name}.>",
                self._requests[name],
                self._errors[name],
                self._service_ns[name],
                self._last_error.get(name, ""),
            )
            for name in (target.name for target in targets)
        ]

"""A step on its way through the gateway: what it holds and how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gateway.core.lifecycle import Event, State, advance
from gateway.core.permit import Permit
from gateway.policy import Ending, Sample
from gateway.types import Flow, Step, StepResult


@dataclass(slots=True, eq=False)
class Passage:
    """A context manager: leaving the `with` block calls `end(passage, error)`, once, whatever happened to the step."""

    step: Step
    flow: Flow
    arrived_s: float
    span: object
    end: Callable[["Passage", BaseException | None], None]
    state: State = State.RECEIVED
    permit: Permit | None = None
    region: str = ""  # where it was sent
    dispatched_s: float = 0.0
    result: StepResult | None = None

    def advance(self, event: Event) -> None:
        self.state = advance(self.state, event)

    def stored(self, now_s: float) -> None:
        self.dispatched_s = now_s
        self.advance(Event.STORE)

    def sample(self, ending: Ending, now_s: float) -> Sample:
        """What policies learn from this step."""
        result = self.result
        return Sample(
            scope=self.flow.scope,
            ending=ending,
            round_trip_s=now_s - self.dispatched_s if self.dispatched_s else 0.0,
            queue_s=result.queue_us / 1e6 if result else 0.0,
            service_s=result.service_us / 1e6 if result else 0.0,
            inflight=self.permit.inflight if self.permit else 0,
            cost=self.flow.cost,
            worker_wait_s=result.worker_wait_us / 1e6 if result else 0.0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(self, error)

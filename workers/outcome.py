"""The result that each way of ending a step stands for. Pure."""

from gateway.errors import Expired, NearloopError
from gateway.types import Payload, Status, StepResult
from workers.held import Held, Stop
from workers.wait_window import WaitWindows

_STOPPED = {
    Stop.CANCELLED: (Status.CANCELLED, "CANCELLED", "CANCELLED", "the step was cancelled"),
    Stop.DEADLINE: (Status.EXPIRED, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "the deadline passed before the step ended"),
    Stop.TIMEOUT: (Status.EXPIRED, "DEADLINE_EXCEEDED", "TARGET_TIMEOUT", "the target's time-out passed before the step ended"),
}
DEAD_REASON = "MAX_DELIVER"


class Outcomes:
    """Makes the results of one worker; each carries what the worker saw its target's steps wait lately."""

    def __init__(self, region: str, worker: str) -> None:
        self.region = region
        self.worker = worker
        self.waits = WaitWindows()

    def _result(self, held: Held, status: Status, code: str, reason: str, message: str) -> StepResult:
        return self._make(held, status, Payload(b""), code, reason, message)

    def _make(self, held: Held, status: Status, output: Payload, code: str = "", reason: str = "", message: str = "") -> StepResult:
        step = held.step
        return StepResult(
            step.id,
            step.tenant,
            status,
            output,
            held.attempt,
            self.region,
            self.worker,
            held.queue_us,
            int(held.service_s * 1e6),
            code,
            reason,
            message,
            self.waits.average_us(step.target),
        )

    def done(self, held: Held, output: Payload) -> StepResult:
        return self._make(held, Status.DONE, output)

    def stopped(self, held: Held, cause: Stop) -> StepResult:
        """For every cause but DRAIN, after which the step goes back."""
        return self._result(held, *_STOPPED[cause])

    def expired_before_start(self, held: Held) -> StepResult:
        return self._result(
            held, Status.EXPIRED, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "the deadline passed before the step was started"
        )

    def dead(self, held: Held, max_deliver: int) -> StepResult:
        return self._result(held, Status.DEAD, "ABORTED", DEAD_REASON, dead_message(max_deliver))

    def failed(self, held: Held, error: Exception) -> StepResult:
        return self._result(held, *failed_result(error))


def failed_result(error: Exception) -> tuple[Status, str, str, str]:
    """Status, code, reason and message. An error that is not ours keeps its text to itself: it may quote the input."""
    if isinstance(error, Expired):
        return Status.EXPIRED, error.code, error.reason, error.message
    if isinstance(error, NearloopError):
        return Status.FAILED, error.code, error.reason, error.message
    return Status.FAILED, "INTERNAL", "EXECUTOR_ERROR", f"the executor raised {type(error).__name__}"


def dead_message(max_deliver: int) -> str:
    return f"given up after {max_deliver} deliveries without a result"

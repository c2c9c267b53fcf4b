"""What a committed result means: as an error for the client, as a sample for the policies, as a state of a job."""

from gateway.errors import Cancelled, Expired, NearloopError, Rejected, StepFailed, Unavailable
from gateway.policy import Ending
from gateway.types import Completed, JobState, Status, StepResult, Timing

_STATES = {status: JobState(status.value) for status in Status}


def failure(result: StepResult) -> NearloopError | None:
    """The error that a result stands for; None when the step is done."""
    if result.status is Status.DONE:
        return None
    if result.status is Status.EXPIRED:
        return Expired(result.message or "the deadline passed before the step was done", reason=result.reason or None)
    if result.status is Status.CANCELLED:
        return Cancelled(result.message or "the step was cancelled", reason=result.reason or None)
    if result.status is Status.DEAD:
        return StepFailed(result.message or "the step was given up", code=result.code or "ABORTED", reason=result.reason or "DEAD_LETTERED")
    return StepFailed(result.message or "the step failed", code=result.code or "INTERNAL", reason=result.reason or None)


def ending(error: BaseException | None) -> Ending:
    """What the end of a step says about capacity."""
    if error is None:
        return Ending.SUCCEEDED
    return Ending.DROPPED if isinstance(error, Expired | Rejected | Unavailable) else Ending.IGNORED


def job_state(result: StepResult) -> JobState:
    return _STATES[result.status]


def completed(result: StepResult, admission_s: float, total_s: float) -> Completed:
    """Adds the timing record: what is neither admission, queue nor service was spent on the way."""
    admission_us, total_us = int(admission_s * 1e6), int(total_s * 1e6)
    network_us = max(0, total_us - admission_us - result.queue_us - result.service_us)
    return Completed(result, Timing(admission_us, result.queue_us, network_us, result.service_us))

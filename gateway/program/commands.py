"""What the engine asks its runner to do."""

from dataclasses import dataclass

from gateway.program.model import Json
from gateway.program.problems import RunFailed
from gateway.types import Kind, Lane


@dataclass(frozen=True, slots=True)
class StartCall:
    """Have `target` execute a step, and apply its outcome as Completed or Failed with the same key and attempt.

    node_id is the node of the program. input belongs to the engine: it is not to be changed. lane and timeout_s: None for the target's.
    """

    key: str
    attempt: int
    node_id: str
    kind: Kind
    target: str
    input: Json
    lane: Lane | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Apply TimerFired(key) delay_s from now.

    is_retry: the wait is for another attempt of a call, so the runner multiplies it with jitter of its own, and need not journal its end.
    Otherwise it is the wall time of an agent, to be taken exactly, from the moment that the event was journalled to which this was the
    answer, also by a runner that takes over.
    """

    key: str
    delay_s: float
    is_retry: bool


@dataclass(frozen=True, slots=True)
class Cancel:
    """The call or wait with this key is not needed any more. Its outcome is not to be applied."""

    key: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The run has ended well. Nothing runs or waits any more."""

    output: Json


@dataclass(frozen=True, slots=True)
class Fail:
    """The run has failed or was cancelled. What still ran is in the Cancel commands before this one."""

    error: RunFailed


Command = StartCall | Wait | Cancel | Finish | Fail

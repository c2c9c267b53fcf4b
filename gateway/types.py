"""The words of Nearloop as frozen values. Standard library only; no I/O, no clock."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

NO_METADATA: Mapping[str, str] = MappingProxyType({})


class Kind(StrEnum):
    """What executes a step."""

    INFER = "infer"
    TOOL = "tool"
    RETRIEVE = "retrieve"
    RUN = "run"


class Lane(StrEnum):
    """A priority tier; the order of the members is the order of precedence."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


LANES: tuple[Lane, ...] = tuple(Lane)

TIERS = 6  # of importance: 0 is served first and shed last
LANE_TIER: Mapping[Lane, int] = MappingProxyType({Lane.INTERACTIVE: 1, Lane.STANDARD: 3, Lane.BATCH: 5})


class Status(StrEnum):
    """How a step ended. Every accepted step gets exactly one of these."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"


JSON = "application/json"
TENSORS = "application/x-nearloop-tensors"  # a serialised nearloop.v1.Tensors


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes with a content type: `application/json`, `application/x-nearloop-tensors` or anything a tool takes."""

    data: bytes = b"{}"
    content_type: str = JSON


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of agent work as the kernel sees it: checked, with its tenant, not yet decided about.

    deadline_s is wall-clock time (seconds since 1970, UTC), since it travels between machines. regions: in which it may be executed; empty
    for all that its target allows.
    """

    id: str
    tenant: str
    kind: Kind
    target: str
    input: Payload
    deadline_s: float
    lane: Lane = Lane.STANDARD
    run: str = ""
    idempotency_key: str = ""
    client_region: str = ""
    stream: bool = False
    traceparent: str = ""
    tracestate: str = ""
    regions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Flow:
    """What policies see of a step: who is charged, how urgent, how expensive.

    deadline_s is on the clock of the policies' `now_s` (monotonic), not wall-clock time as in `Step`. cost is in the target's cost units,
    an estimate until the step has ended. tier is from 0, the most important, to TIERS - 1; the lane gives it, a classifier may change it.
    """

    tenant: str
    target: str
    kind: Kind
    lane: Lane
    run: str = ""
    deadline_s: float = float("inf")
    cost: float = 1.0
    tier: int = LANE_TIER[Lane.STANDARD]
    client_region: str = ""
    favoured: bool = False  # by admission, for example as a step of a run that was begun

    @property
    def scope(self) -> str:
        """The concurrency limit that the flow falls under, for example `infer.plan`."""
        return f"{self.kind}.{self.target}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A model's input or output; -1 in the shape is any size. The batch dimension is part of the shape."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A named model, tool or collection from the catalogue.

    regions: in which its steps may be executed, and runs that call it; empty for any.
    """

    kind: Kind
    name: str
    description: str = ""
    home_region: str = "home"
    cost: float = 1.0
    slots: int = 16
    timeout_s: float = 30.0
    read_only: bool = False
    idempotent: bool = False
    max_deliver: int = 5
    input_schema: Mapping[str, object] | None = None
    tensor_inputs: tuple[TensorSpec, ...] = ()
    tensor_outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int = 0
    regions: tuple[str, ...] = ()

    @property
    def scope(self) -> str:
        return f"{self.kind.value}.{self.name}"


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step ended with; the one thing that is committed for it. Times in microseconds."""

    step_id: str
    tenant: str
    status: Status
    output: Payload = field(default_factory=Payload)
    attempt: int = 1
    region: str = ""
    worker: str = ""
    queue_us: int = 0
    service_us: int = 0
    code: str = ""  # a gRPC status name such as INVALID_ARGUMENT, empty when the step is done
    reason: str = ""  # UPPER_SNAKE_CASE
    message: str = ""
    worker_wait_us: int = 0  # average wait for a slot of this worker, of all gateways' steps for the target, over its last window


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a step's time went, microseconds."""

    admission_us: int = 0
    queue_us: int = 0
    network_us: int = 0
    service_us: int = 0


@dataclass(frozen=True, slots=True)
class Completed:
    """A result with the timing record of the gateway that waited for it."""

    result: StepResult
    timing: Timing


class EventKind(StrEnum):
    STARTED = "started"
    TOKEN = "token"
    PROGRESS = "progress"
    ENDED = "ended"  # a result has been committed; read it from the results stream


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One thing that happened while a step was executed; travels on core NATS and is not stored.

    sequence counts from 1 in each attempt. `fraction` and `message` belong to PROGRESS, `payload` to TOKEN.
    """

    step_id: str
    kind: EventKind
    attempt: int
    sequence: int
    region: str = ""
    worker: str = ""
    payload: Payload | None = None
    fraction: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A durably stored step. Where it stands follows from result and time."""

    step: Step
    region: str
    created_s: float
    digest: str  # of kind, target and input, to notice a key that is used again for something else

    def record(self) -> "Job":
        """What is kept of it when the step has left its queue: everything but the input."""
        return replace(self, step=replace(self.step, input=Payload(b"", self.step.input.content_type)))


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job and where it stands; result is set once it has ended."""

    job: Job
    state: JobState
    result: StepResult | None = None


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What was learnt about a model's executions: a batch of b steps takes fixed_s + each_s * b seconds."""

    fixed_s: float
    each_s: float
    batches: int  # that this was learnt from


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """A target, the regions that have live workers for it, and what one of them learnt about the cost of its batches."""

    target: Target
    live_regions: tuple[str, ...] = ()
    batch_cost: BatchCost | None = None


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker tells about itself in its heartbeat. `targets` holds scopes such as `tool.docs`."""

    id: str
    region: str
    kind: Kind
    targets: tuple[str, ...]
    slots: int = 0
    running: int = 0
    draining: bool = False
    batch_costs: Mapping[str, BatchCost] = field(default_factory=dict)  # by scope, where something was learnt


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A candidate for routing: a region with live workers (0 when it has none) for a target.

    extra_s: how much longer a step is under way through this region than through the best one, as measured; 0 for the best one and for
    no other. None while it is not known: then the target's home is taken to be the best.
    """

    region: str
    workers: int
    slots: int
    running: int
    round_trip_s: float  # from the region of the gateway; where that is measured, through the workers and on to what the target calls
    home: bool  # the target's home region
    inflight: int = 0  # steps for the target that this gateway has sent there and that have not ended
    extra_s: float | None = None

    @property
    def nearest(self) -> bool:
        return self.home if self.extra_s is None else self.extra_s == 0.0

    @property
    def load(self) -> float:
        """Steps there for each slot: what all gateways have running, as of the last heartbeat, or what this one has in flight, whichever
        is more. 0 while no slots are known."""
        return max(self.running, self.inflight) / self.slots if self.slots else 0.0

"""Protocols between the kernel or the workers and the edges. What crosses is a value from `types` or an error from `errors`."""

from asyncio import Future
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gateway.run_types import OpenRun, Placement, RoundTrip, RoundTrips, RunOrder, RunRecord, RunStatus
from gateway.types import (
    Completed,
    Flow,
    Job,
    JobStatus,
    Kind,
    Lane,
    Payload,
    Step,
    StepEvent,
    StepResult,
    Target,
    TargetStatus,
    WorkerInfo,
)


class Verdict(NamedTuple):
    """What became of a policy's parameter that was changed from outside."""

    applied: bool
    message: str


class Subscription(Protocol):
    async def close(self) -> None: ...


class StepService(Protocol):
    """What the ingress needs of the kernel. Steps are checked by then: identity, ids, sizes, target and input.

    Everything raises the errors of `gateway.errors`; a result that is not DONE is raised as the error that it stands for.
    """

    async def execute(self, step: Step) -> Completed: ...

    def stream(self, step: Step) -> AsyncGenerator[StepEvent | Completed, None]:
        """Events, then the result as the last item."""
        ...

    async def submit(self, step: Step) -> tuple[JobStatus, bool]:
        """Returns the job and whether this call stored it. step.id is replaced by the job's id. Raises AlreadyExists."""
        ...

    async def job(self, tenant: str, job_id: str) -> JobStatus: ...

    def watch(self, tenant: str, job_id: str, attempt: int, after_sequence: int) -> AsyncGenerator[StepEvent | Completed, None]: ...

    async def cancel(self, tenant: str, job_id: str) -> JobStatus: ...

    def window(self, tenant: str, sessions: int, tenant_sessions: int, granted: int, outstanding: int) -> int:
        """How many steps a session may have outstanding; the numbers are those of `policy.CreditView`."""
        ...

    def target(self, kind: Kind, name: str) -> Target | None: ...

    def targets(self, kind: Kind | None = None) -> Sequence[TargetStatus]: ...


class RunService(Protocol):
    """What the ingress needs for runs. Orders are checked by then: identity, ids, sizes, program, targets, input; `order.id` is empty.

    Everything raises the errors of `gateway.errors`. A run that fails is raised as the error that its result stands for.
    """

    def run(self, order: RunOrder) -> AsyncGenerator[RunStatus | StepEvent | Completed, None]:
        """Its status once it is accepted (durably), its events (tokens of content type RUN_EVENT; STARTED), its result as the last item.
        The run goes on when nobody listens any more."""
        ...

    async def submit_run(self, order: RunOrder) -> tuple[RunStatus, bool]:
        """The run, and whether this call accepted it (False: the key was used before). Raises AlreadyExists."""
        ...

    async def run_status(self, tenant: str, run_id: str) -> RunStatus:
        """Raises NotFound."""
        ...

    def watch_run(self, tenant: str, run_id: str, attempt: int, after_sequence: int) -> AsyncGenerator[StepEvent | Completed, None]: ...

    async def cancel_run(self, tenant: str, run_id: str) -> RunStatus: ...

    async def place(self, order: RunOrder) -> Placement:
        """Where the run would be placed now, without running it."""
        ...


class LeaseLost(Exception):
    """Another runner has taken the run over: this one must stop, and say nothing more about it."""


class NotHere(Exception):
    """This worker must not execute the step, one of another region may: it goes back to its queue."""


class RunJournal(Protocol):
    """What happened in a run, kept in the region that executes it. One runner at a time can append."""

    async def read(self) -> Sequence[bytes]:
        """All entries, in order; `append` goes on after the last. Raises Unavailable."""
        ...

    async def append(self, entry: bytes) -> None:
        """Returns when it is stored. Raises LeaseLost when somebody else has appended since, Unavailable (then it may be stored; the
        same entry again is safe), InvalidStep when it is too large for the transport."""
        ...


class RunStore(Protocol):
    """Where runs are kept: the record at its origin, the journal where it runs. Everything raises Unavailable when the region that has
    it does not answer."""

    async def accept(self, record: RunRecord) -> tuple[RunRecord, bool]:
        """Stores the record with its body, and a mark that it is open: True. False with the record that was there already."""
        ...

    async def find(self, tenant: str, run_id: str) -> RunRecord | None:
        """Without its body."""
        ...

    async def body(self, record: RunRecord) -> RunRecord | None:
        """The record with its body; None when the run has been closed."""
        ...

    async def mark(self, tenant: str, run_id: str) -> OpenRun | None:
        """None once the run has been closed."""
        ...

    async def open_runs(self, origin: str) -> Sequence[OpenRun]: ...

    async def move(self, run: OpenRun, region: str) -> OpenRun | None:
        """Notes that the run is placed elsewhere now; None when another keeper was first."""
        ...

    async def close_run(self, tenant: str, run_id: str) -> None:
        """Takes mark and body away: the run has its result."""
        ...

    async def send(self, record: RunRecord, region: str) -> None:
        """Puts the token into the region's queue. Repeatable."""
        ...

    async def waits(self, record: RunRecord, region: str) -> bool:
        """True while the token is in the region's queue, or held by a runner. Does not ask for long."""
        ...

    async def withdraw(self, record: RunRecord, region: str) -> None:
        """Takes the token out of the region's queue and tells the runner that has it to stop."""
        ...

    def journal(self, region: str, tenant: str, run_id: str, keep_s: float) -> RunJournal: ...

    async def put_value(self, tenant: str, run_id: str, data: bytes, keep_s: float) -> str:
        """Keeps a large value in the own region; returns its name, the same for the same bytes."""
        ...

    async def value(self, tenant: str, run_id: str, name: str, region: str) -> bytes | None: ...


class Tracer(Protocol):
    """Trace context and spans of a step, for the kernel."""

    def start(self, step: Step, flow: Flow) -> tuple[Step, object]:
        """The step with the context that travels on, and the span, None when nothing is recorded."""
        ...

    def end(self, span: object, error: BaseException | None) -> None: ...


class GatewayBus(Protocol):
    """What a gateway needs of the transport. Everything raises `Unavailable` when the transport is down for too long."""

    async def start(self) -> None:
        """Connects, creates or checks streams and consumers, loads the live catalogue.

        Raises TopologyMismatch, Unavailable.
        """
        ...

    async def close(self) -> None: ...

    @property
    def connected(self) -> bool: ...

    def new_id(self) -> str:
        """An id for a step of this gateway. Other ids work as well; the result of this one comes back by the shortest way."""
        ...

    def execute(self, step: Step, region: str) -> "Future[StepResult]":
        """Stores the step in the region's queue; the future ends with its result, whatever the status.

        It raises Rejected (reason QUEUE_FULL), InvalidStep (too large for the transport), Unavailable (not known to be stored after
        retries with the same id), or Expired (no result a moment after the deadline). A reply that was lost is found again in the
        results stream. Cancelling the future forgets the step here and nothing else.
        """
        ...

    async def submit(self, job: Job) -> tuple[Job, bool]:
        """Stores job record and step in one atomic batch; returns when both are durable.

        Returns the job's record (without the input) and True, or that of the job that was there already and False.
        Raises Rejected (QUEUE_FULL), InvalidStep.
        """
        ...

    async def job(self, tenant: str, job_id: str) -> Job | None: ...

    async def result(self, tenant: str, step_id: str) -> StepResult | None:
        """The stored result of a job or a run; the region that has it is in the id."""
        ...

    async def is_queued(self, step: Step, region: str) -> bool:
        """True while the step is stored in its queue: waiting for a worker, or held by one that has not acknowledged it."""
        ...

    async def commit(self, result: StepResult, keep_s: float) -> bool:
        """Stores the result if the step has none yet, for keep_s seconds; False when another one was first."""
        ...

    async def withdraw(self, step: Step, region: str) -> None:
        """Removes the step from the queue and tells the worker that may execute it to stop."""
        ...

    async def watch(
        self,
        tenant: str,
        step_id: str,
        on_event: Callable[[StepEvent], None],
        on_result: Callable[[StepResult], None] | None = None,
    ) -> Subscription:
        """Calls on_event for each event from now on, and on_result for the result as it is stored, after the events that were told before
        it. The subscription is active at the server when this returns."""
        ...

    async def replay(self, tenant: str, step_id: str, attempt: int, after_sequence: int) -> Sequence[StepEvent]:
        """The events that the executing worker remembers: those after after_sequence when its attempt is `attempt`, else all.

        Empty when no worker executes the step.
        """
        ...

    async def hear(self, mark: str) -> Subscription:
        """From when this returns, results of steps whose ids begin with these eight characters reach `execute` by the shortest way."""
        ...

    def resume(self, step: Step, region: str) -> "Future[StepResult]":
        """Like `execute` for a step that is stored in the region's queue already, perhaps by another process: waits for its result."""
        ...

    async def locate(self, step: Step, regions: Sequence[str], certain: bool = False) -> tuple[StepResult | None, str]:
        """For a step that may have been sent before, to any of these regions: its result if one is stored, and the region in whose queue
        it is, empty for none. Regions that do not answer are taken to have neither, unless it must be certain. Raises Unavailable when
        none answers, or when one does not and it must be certain."""
        ...

    def targets(self) -> Mapping[str, Target]:
        """The live catalogue by scope (`tool.docs`), as workers announced it."""
        ...

    def round_trips(self) -> RoundTrips:
        """What workers of all regions have measured."""
        ...

    def workers(self) -> Sequence[WorkerInfo]:
        """Workers whose heartbeat is fresh."""
        ...


@dataclass(frozen=True, slots=True)
class Queue:
    """A lane of a target's queue in a region. priority 0 is served first; higher numbers only when no lower one waits."""

    region: str
    kind: Kind
    target: str
    lane: Lane
    priority: int = 0


class Delivery(Protocol):
    """A step that this worker holds. Ends in exactly one of ack and nak."""

    @property
    def step(self) -> Step: ...

    @property
    def queue(self) -> Queue: ...

    @property
    def attempt(self) -> int:
        """From 1; counts deliveries, those that were handed back included (`WorkerBus.hand_backs` has their number)."""
        ...

    @property
    def again(self) -> bool:
        """Another worker may have begun it: by the attempt, or since a server that crashed may have forgotten a delivery."""
        ...

    @property
    def queued_us(self) -> int:
        """From being stored until it was delivered here, microseconds."""
        ...

    @property
    def pending(self) -> int:
        """Messages of this lane that wait behind it."""
        ...

    @property
    def reply_to(self) -> str:
        """Subject of the gateway that waits for the result, or empty."""
        ...

    @property
    def answered_by_commit(self) -> bool:
        """True when committing the result also tells the gateway that waits, so that `reply` is only for results found again."""
        ...

    def ack(self) -> None:
        """Ends the step: it leaves the queue. Only after its result is committed."""
        ...

    def nak(self, delay_s: float = 0.0) -> None:
        """To be delivered again after delay_s. Counts as a delivery that failed: a worker uses `WorkerBus.hand_back`."""
        ...

    def let_go(self) -> None:
        """Says nothing more about it: somebody else has it by now, or its hold runs out."""
        ...

    def in_progress(self) -> None:
        """Extends the hold by another AckWait."""
        ...


class Puller(Protocol):
    """A pull loop on one queue."""

    @property
    def credits(self) -> int:
        """Messages that have been asked for and have not come yet."""
        ...

    def want(self, credits: int) -> None:
        """Asks for messages until `credits` are outstanding. Renewed inside when a pull expires, fails or the server restarts."""
        ...

    async def close(self) -> None:
        """Stops asking and returns when no message can come any more."""
        ...


class WorkerBus(Protocol):
    """What a worker needs of the transport."""

    async def start(self) -> None: ...

    async def close(self) -> None:
        """Flushes acknowledgements and results, then disconnects."""
        ...

    @property
    def connected(self) -> bool: ...

    async def announce(self, targets: Sequence[Target]) -> None:
        """Publishes what is known about targets to the live catalogue and makes sure that their queues exist in every region."""
        ...

    async def heartbeat(self, info: WorkerInfo) -> None: ...

    async def retire(self, info: WorkerInfo) -> None:
        """Removes the worker from the live list at once."""
        ...

    async def consume(self, queue: Queue, on_delivery: Callable[[Delivery], None]) -> Puller: ...

    async def result(self, tenant: str, step_id: str, region: str) -> StepResult | None:
        """The stored result, as the region has it whose results stream decides: see `subjects.result_region`."""
        ...

    async def commit(self, result: StepResult, keep_s: float, region: str) -> bool: ...

    async def hand_back(self, delivery: Delivery, delay_s: float) -> None:
        """Notes that the step was handed back, then naks. When the note cannot be written it naks all the same."""
        ...

    async def hand_backs(self, tenant: str, step_id: str, region: str) -> int:
        """How often the step of this region's queue was handed back; what ended without a word, as when a worker died, is not among it."""
        ...

    async def bury(self, delivery: Delivery, reason: str, message: str) -> None:
        """Writes the one entry for the step to the dead-letter stream, with its input and the reason. Repeatable."""
        ...

    def reply(self, subject: str, result: StepResult) -> None:
        """Sends the committed result to the gateway that waits."""
        ...

    def publish_event(self, tenant: str, event: StepEvent) -> None: ...

    async def on_cancel(self, callback: Callable[[str, str], None]) -> Subscription:
        """Calls callback(tenant, step_id) for each cancellation."""
        ...

    async def serve_replay(self, answer: Callable[[str, str, int, int], Sequence[StepEvent] | None]) -> Subscription:
        """Answers replay requests: answer(tenant, step_id, attempt, after_sequence) is None for a step not executed here."""
        ...

    async def ping(self, region: str) -> float:
        """Seconds until a worker of the region has answered. Raises Unavailable when none does within two seconds."""
        ...

    async def serve_ping(self) -> Subscription:
        """Answers such requests for this worker's region; of several workers of a region one answers."""
        ...

    async def publish_round_trip(self, trip: RoundTrip) -> None:
        """Tells gateways of all regions; they forget it after `round_trips.KEEP_S`."""
        ...


class Work(Protocol):
    """What an executor gets. Cancellation arrives as asyncio.CancelledError."""

    @property
    def step(self) -> Step: ...

    @property
    def attempt(self) -> int: ...

    @property
    def again(self) -> bool:
        """Another worker may have begun it, see `Delivery.again`."""
        ...

    @property
    def queue_region(self) -> str:
        """Whose queue it came from; not always the worker's own."""
        ...

    @property
    def leaving(self) -> bool:
        """When it is cancelled: True when this worker stops and another one will go on with the step."""
        ...

    def remaining_s(self) -> float:
        """Time left until the step's deadline, at least 0."""
        ...

    def emit(self, token: Payload) -> None:
        """Streams a piece of output."""
        ...

    def progress(self, fraction: float, message: str) -> None:
        """Says how far the work is; fraction from 0 to 1."""
        ...


class Executor(Protocol):
    """Executes the steps of one kind of worker."""

    async def start(self) -> None:
        """Connects. Raises Unavailable when the part behind it is not ready; the worker then waits and tries again."""
        ...

    async def close(self) -> None: ...

    def targets(self) -> Sequence[Target]:
        """What can be executed now; known after start()."""
        ...

    def ready(self, target: str) -> bool:
        """False while work for the target should stay in the queue."""
        ...

    def execute(self, work: Work) -> Awaitable[Payload]:
        """Raises StepFailed or InvalidStep (the step ends with that), Unavailable (the step goes back to the queue)."""
        ...

"""The policy Protocols: what a plugin implements. One for each slot.

A policy is synchronous and pure: time (`now_s`, monotonic seconds) and randomness (`random`, 0 <= x < 1) are arguments, views are
read-only, and its state lives in its own object. The kernel owns queues, clock, random source and counters. It never calls two methods
of a policy at once.

Which object decides about what:

    limit, ordering, backpressure, batching   one object for each scope (target)
    fairness                                  one object for each scope and tier
    admission                                 one object for the process, or one for each scope where PolicyType.per_scope says so
    all others                                one object for the process

Composition, fixed by the kernel:

    classify       each in the order of the config; the later one sees what the earlier one made
    admission      in the order of the config, cheapest first; any Reject wins, earlier ones are released in reverse
    limit          the minimum
    tiers          the most important tier that waits goes first; a full queue gives up its least important step for a more important one
    fairness       one: which flow of the tier is next       ordering   one: which step of that flow is next
    backpressure   all must agree that a step waits, the shortest wait counts; the largest retry-after
    credits        one: how much may a session have in flight
    routing        the sum of weighted scores; the highest wins
    batching       the first that serves the model
    sampling       head: the maximum, never below an upstream decision; tail: any Keep
    redaction      each in order                             observers  all

Any policy may have a method `reconfigure(config)`: parameters were changed while it runs, its state stays. Without it they cannot be.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from gateway.types import BatchCost, Endpoint, Flow, Step


class Slot(StrEnum):
    CLASSIFY = "classify"
    ADMISSION = "admission"
    LIMIT = "limit"
    FAIRNESS = "fairness"
    ORDERING = "ordering"
    BACKPRESSURE = "backpressure"
    CREDITS = "credits"
    ROUTING = "routing"
    BATCHING = "batching"
    HEAD_SAMPLING = "head_sampling"
    TAIL_SAMPLING = "tail_sampling"
    REDACTION = "redaction"
    OBSERVER = "observer"


class OnError(StrEnum):
    """What the kernel does for a policy that raises, answers nonsense or is suspended: go on without it, or reject the step.

    It applies to the slots that can refuse a step: classify, admission and backpressure (`may_wait`). Others are gone without.
    """

    ADMIT = "admit"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class PolicyType:
    """What a plugin registers: `build(config)` makes one instance for each entry in the configuration.

    config is a frozen dataclass; its fields are the parameters that the TOML may set, with their types and defaults. Its
    __post_init__ raises ValueError with a sentence for a value out of range.
    """

    name: str
    slot: Slot
    config: type[Any]
    build: Any  # Callable[[config], policy]; typed loosely, since each slot has its own Protocol
    summary: str = ""
    on_error: OnError = OnError.ADMIT
    per_scope: bool = False  # admission: one object for each target


# ---- decisions -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admit:
    """Go on. `state` is given back to the policy in `release`, so that a reservation can be undone.

    favoured: the gate's policies see it in `Flow.favoured`; refusing this step costs more than refusing another of its tier.
    """

    state: Any = None
    favoured: bool = False


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse now. reason is UPPER_SNAKE_CASE; scope says whose limit it is; retry_after_s is None when unknown.

    drain_hint: the backpressure policies are asked for the hint, since it is the target's load that will be over or not.
    denied: not a matter of load, so coming back is no use (PERMISSION_DENIED instead of RESOURCE_EXHAUSTED).
    """

    reason: str
    message: str
    scope: str = ""
    retry_after_s: float | None = None
    denied: bool = False
    drain_hint: bool = False


Decision = Admit | Reject
ADMIT = Admit()


class Ending(StrEnum):
    """How a permit ends: exactly one of these."""

    SUCCEEDED = "succeeded"  # the sample is good for estimates
    IGNORED = "ignored"  # says nothing about capacity: cancelled, invalid, failed for reasons of its own
    DROPPED = "dropped"  # a sign of overload: expired, refused downstream, unavailable


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished step, for limits and estimators. Times in seconds; inflight as it was when the step got its permit, itself included.

    cost is what the step really cost: its service time over the average one of a cost unit at its target, once that is known.
    """

    scope: str
    ending: Ending
    round_trip_s: float  # from dispatch to result; 0 when it was never dispatched
    queue_s: float  # of it, in the queue, as the worker measured it
    service_s: float  # of it, executing, waiting inside Triton included
    inflight: int
    cost: float = 1.0
    worker_wait_s: float = 0.0  # average wait for a slot of its worker over the last window, all gateways' steps together
    waited_s: float = 0.0  # for its permit


# ---- views ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScopeView:
    """A concurrency limit's scope as policies see it. Measured values are 0 while unknown."""

    scope: str
    inflight: int
    limit: int
    waiting: int
    oldest_wait_s: float
    drain_per_s: float  # completions a second
    round_trip_s: float = 0.0  # of recent successful steps, from dispatch to result: exponential average
    service_s: float = 0.0  # of it, executing
    calm_s: float = float("inf")  # since a step was last refused here for its load, whoever refused it


# ---- slots ---------------------------------------------------------------------------------------------------------------------


class Classifier(Protocol):
    """Which flow does a step belong to, and what does it cost?"""

    def classify(self, step: Step, flow: Flow) -> Flow: ...


class AdmissionPolicy(Protocol):
    """May this step enter at all?"""

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision: ...

    def release(self, flow: Flow, state: Any, now_s: float) -> None:
        """The step was not executed: a later policy or the gate refused it, its time to wait was over, its caller left, or a job could
        not be stored. Give back what `decide` reserved."""
        ...

    def ended(self, flow: Flow, state: Any, sample: Sample, now_s: float) -> None:
        """The admitted step ended."""
        ...


class LimitPolicy(Protocol):
    """How many steps of a scope may be in flight? Asked anew after each sample and change of parameters, not in between.

    `batch_slots(slots)`, where a policy has it, tells of a model that takes batches how many steps its live workers take together: as
    many as fill a batch in each instance and another one that gathers meanwhile. 0 when nobody serves it.
    """

    def limit(self, scope: str) -> int: ...

    def on_sample(self, sample: Sample, now_s: float, random: float) -> None: ...


class FairnessPolicy(Protocol):
    """Which flow may dispatch next? Asked about the waiting steps of one tier."""

    def key(self, flow: Flow) -> Hashable:
        """Steps with the same key share a queue."""
        ...

    def activate(self, key: Hashable, flow: Flow, now_s: float) -> None:
        """The key had nothing waiting and has now. The policy keeps the set of active keys, so that `pick` need not be O(n)."""
        ...

    def deactivate(self, key: Hashable, now_s: float) -> None:
        """The key has nothing waiting any more."""
        ...

    def pick(self, now_s: float) -> Hashable:
        """Chooses among the active keys; called only when there is one."""
        ...

    def charge(self, key: Hashable, flow: Flow, cost: float, now_s: float) -> None:
        """The estimated cost at dispatch; when the step has ended the difference to the real cost, which may be negative."""
        ...


OrderKey = tuple[float, ...]


class OrderingPolicy(Protocol):
    """Which step of a flow is next? The smallest key; ties by arrival."""

    def key(self, flow: Flow, arrived_s: float, view: ScopeView) -> OrderKey: ...


class BackpressurePolicy(Protocol):
    """May a step wait, until when, and what hint does a refused client get?"""

    def may_wait(self, flow: Flow, view: ScopeView, now_s: float) -> float | None:
        """Longest wait in seconds, or None when the queue is full for it."""
        ...

    def may_start(self, flow: Flow, waited_s: float, view: ScopeView, now_s: float) -> bool:
        """It is the turn of a step that waited: False refuses it instead, when waiting has made it worthless."""
        ...

    def retry_after_s(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> float | None: ...


@dataclass(frozen=True, slots=True)
class CreditView:
    """The sessions of a gateway when one of them is asked about. A step on a session is outstanding until its answer was written."""

    tenant: str
    sessions: int  # open ones, all tenants
    tenant_sessions: int
    granted: int  # credits of all sessions together that are granted: unused ones and outstanding steps
    outstanding: int  # steps of this session
    wait_s: float  # for a permit, of the steps that got one lately, all scopes: exponential average


class CreditPolicy(Protocol):
    """How many steps may a session have outstanding?"""

    def window(self, view: CreditView, now_s: float) -> int:
        """At least 1, or a session could never do anything. What was granted before is not taken back: a smaller window is reached by
        granting nothing new."""
        ...


class RoutingPolicy(Protocol):
    """Which region gets the step? Higher is better; None excludes the endpoint."""

    weight: float

    def score(self, flow: Flow, endpoint: Endpoint, now_s: float) -> float | None: ...

    def chosen(self, flow: Flow, endpoint: Endpoint, now_s: float) -> None:
        """The step goes there."""
        ...


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model as its worker knows it."""

    name: str
    max_batch_size: int  # 0 or 1: it takes no batches
    server_batches: bool  # the model server has a batcher of its own for it
    instances: int  # executions that the server can run at once


@dataclass(frozen=True, slots=True)
class BatchView:
    """The steps that wait in a worker for one model."""

    size: int
    max_size: int
    oldest_wait_s: float
    least_slack_s: float  # until the first deadline among them
    idle_slots: int  # executions that could start at once
    arrivals_per_s: float


class BatchingPolicy(Protocol):
    """Send what is here, or wait for more?"""

    def serves(self, model: ModelView) -> bool:
        """Is it the one for this model? The first policy that says so gets an object for it."""
        ...

    def wait_s(self, view: BatchView, now_s: float) -> float:
        """0 sends now; otherwise asks again after that time, at the next arrival, or when an execution ended."""
        ...

    def on_batch(self, size: int, service_s: float, now_s: float) -> None: ...

    def learnt(self) -> BatchCost | None:
        """What is known of the model's cost by now, for people to look at."""
        ...


class HeadSampler(Protocol):
    """With which probability is this trace recorded?"""

    def probability(self, flow: Flow, upstream_sampled: bool | None, now_s: float) -> float: ...


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """A finished step or run, for the tail decision."""

    flow: Flow
    ok: bool
    duration_s: float
    attempts: int
    reason: str
    spans: int
    size_bytes: int


class TailSampler(Protocol):
    """Is this finished trace kept?"""

    def keep(self, summary: TraceSummary, now_s: float, random: float) -> bool: ...


class Redactor(Protocol):
    """What may leave in a span or a log?"""

    def redact(self, attributes: Mapping[str, str]) -> Mapping[str, str]: ...


class Observer(Protocol):
    """Hears what happened; decides nothing."""

    def rejected(self, flow: Flow, policy: str, reason: str, now_s: float) -> None: ...

    def ended(self, flow: Flow, sample: Sample, now_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Named:
    """A policy object with its name from the configuration and what to do when it raises.

    shadow: it decides, its decisions are counted, and they have no effect.
    """

    name: str
    slot: Slot
    policy: Any
    on_error: OnError
    shadow: bool = False


# Slots whose policies are built for each scope, whatever PolicyType.per_scope says.
SCOPED = frozenset({Slot.LIMIT, Slot.FAIRNESS, Slot.ORDERING, Slot.BACKPRESSURE, Slot.BATCHING})

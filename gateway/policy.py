"""The policy Protocols: what a plugin implements. One for each slot.

A policy is synchronous and pure: time (`now_s`, monotonic seconds) and randomness (`random`, 0 <= x < 1) are arguments, views are
read-only, and its state lives in its own object. The kernel owns queues, clock, random source and counters.

Composition, fixed by the kernel:

    classify       each in the order of the config; the later one sees what the earlier one made
    admission      in the order of the config, cheapest first; any Reject wins, earlier ones are released in reverse
    limit          the minimum
    fairness       one: which flow is next          ordering   one: which step of that flow is next
    backpressure   the largest retry-after          routing    the sum of weighted scores; the highest wins
    batching       one for each model               sampling   head: the maximum, never below an upstream decision; tail: any Keep
    redaction      each in order                    observers  all
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from gateway.types import Endpoint, Flow, Step


class Slot(StrEnum):
    CLASSIFY = "classify"
    ADMISSION = "admission"
    LIMIT = "limit"
    FAIRNESS = "fairness"
    ORDERING = "ordering"
    BACKPRESSURE = "backpressure"
    ROUTING = "routing"
    BATCHING = "batching"
    HEAD_SAMPLING = "head_sampling"
    TAIL_SAMPLING = "tail_sampling"
    REDACTION = "redaction"
    OBSERVER = "observer"


class OnError(StrEnum):
    """What the kernel does for a policy that raises: go on without it, or reject the step."""

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


# ---- decisions -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admit:
    """Go on. `state` is given back to the policy in `release`, so that a reservation can be undone."""

    state: Any = None


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse now. reason is UPPER_SNAKE_CASE; scope says whose limit it is; retry_after_s is None when unknown.

    denied: not a matter of load, so coming back is no use (PERMISSION_DENIED instead of RESOURCE_EXHAUSTED).
    """

    reason: str
    message: str
    scope: str = ""
    retry_after_s: float | None = None
    denied: bool = False


Decision = Admit | Reject
ADMIT = Admit()


class Ending(StrEnum):
    """How a permit ends: exactly one of these."""

    SUCCEEDED = "succeeded"  # the sample is good for estimates
    IGNORED = "ignored"  # says nothing about capacity: cancelled, invalid, failed for reasons of its own
    DROPPED = "dropped"  # a sign of overload: expired, refused downstream, unavailable


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished step, for limits and estimators. Times in seconds; inflight as it was when the step started."""

    scope: str
    ending: Ending
    round_trip_s: float
    queue_s: float
    service_s: float
    inflight: int
    cost: float = 1.0
    level: int = 0  # overload level that the worker reported, 0 for none


# ---- views ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScopeView:
    """A concurrency limit's scope as policies see it."""

    scope: str
    inflight: int
    limit: int
    waiting: int
    oldest_wait_s: float
    drain_per_s: float  # measured completions a second, 0 when unknown


# ---- slots ---------------------------------------------------------------------------------------------------------------------


class Classifier(Protocol):
    """Which flow does a step belong to, and what does it cost?"""

    def classify(self, step: Step, flow: Flow) -> Flow: ...


class AdmissionPolicy(Protocol):
    """May this step enter at all?"""

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision: ...

    def release(self, flow: Flow, state: Any, now_s: float) -> None:
        """A later policy rejected the step: give back what `decide` reserved."""
        ...

    def ended(self, flow: Flow, state: Any, sample: Sample, now_s: float) -> None:
        """The admitted step ended."""
        ...


class LimitPolicy(Protocol):
    """How many steps of a scope may be in flight, and how many may wait how long?"""

    def limit(self, scope: str) -> int: ...

    def on_sample(self, sample: Sample, now_s: float) -> None: ...


class FairnessPolicy(Protocol):
    """Which flow may dispatch next?"""

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
        """Cost at dispatch, and corrections (also negative) when the real cost is known."""
        ...


class OrderingPolicy(Protocol):
    """Which step of a flow is next? The smallest key; ties by arrival."""

    def key(self, flow: Flow, arrived_s: float, view: ScopeView) -> float: ...


class BackpressurePolicy(Protocol):
    """May a step wait, until when, and what hint does a refused client get?"""

    def may_wait(self, flow: Flow, view: ScopeView, now_s: float) -> float | None:
        """Longest wait in seconds, or None to refuse at once."""
        ...

    def retry_after_s(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> float | None: ...

    def credits(self, client: str, view: ScopeView, now_s: float) -> int:
        """Steps that a session may have in flight."""
        ...


class RoutingPolicy(Protocol):
    """Which region gets the step? Higher is better; None excludes the endpoint."""

    weight: float

    def score(self, flow: Flow, endpoint: Endpoint, now_s: float) -> float | None: ...


@dataclass(frozen=True, slots=True)
class BatchView:
    """The steps that wait in a worker for one model."""

    size: int
    max_size: int
    oldest_wait_s: float
    least_slack_s: float
    idle_slots: int
    arrivals_per_s: float


class BatchingPolicy(Protocol):
    """Send what is here, or wait for more?"""

    def wait_s(self, view: BatchView, now_s: float) -> float:
        """0 sends now; otherwise asks again after that time or at the next arrival."""
        ...

    def on_batch(self, size: int, service_s: float, now_s: float) -> None: ...


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
    """A policy instance with its name from the configuration and what to do when it raises."""

    name: str
    slot: Slot
    policy: Any
    on_error: OnError

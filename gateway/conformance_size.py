"""How much a policy remembers, and what a decision costs with few flows and with many."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from gateway.policy import BatchView, CreditView, Ending, ModelView, PolicyType, Sample, ScopeView, Slot, TraceSummary
from gateway.types import Endpoint, Flow, Kind, Lane, Payload, Step

FEW_FLOWS, MANY_FLOWS = 10, 5000
MOST_US, MOST_GROWTH, NOISE_US = 50.0, 2.0, 5.0
_VIEW = ScopeView("tool.x", 3, 8, 5, 0.25, 12.0, 0.12, 0.1)
_SAMPLE = Sample("tool.x", Ending.SUCCEEDED, 0.12, 0.02, 0.1, 3)
_ENDPOINTS = (Endpoint("a", 2, 8, 3, 0.0, True), Endpoint("b", 2, 8, 1, 0.03, False))


def size_bytes(thing: object) -> int:
    """Of everything that is reachable from it, classes, functions and modules left out."""
    seen: set[int] = set()
    todo, total = [thing], 0
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType | BuiltinFunctionType):
            continue
        seen.add(id(one))
        total += sys.getsizeof(one)
        if isinstance(one, Mapping):
            todo += [part for item in one.items() for part in item]
        elif not isinstance(one, str | bytes) and hasattr(one, "__iter__") and hasattr(one, "__len__"):
            todo += list(one)
        todo += list(getattr(one, "__dict__", {}).values())
        for kind in type(one).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            todo += [getattr(one, name) for name in ((slots,) if isinstance(slots, str) else slots) if hasattr(one, name)]
    return total


def decision(slot: Slot, policy: Any) -> Callable[[Flow, float], object]:
    """What is done with a policy of the slot for one step, start to end, as a function of the step's flow and the time."""

    def admission(flow: Flow, now_s: float) -> None:
        answer = policy.decide(flow, _VIEW, now_s, 0.5)
        if hasattr(answer, "state"):
            policy.ended(flow, answer.state, _SAMPLE, now_s)

    def limit(flow: Flow, now_s: float) -> None:
        policy.limit("tool.x")
        policy.on_sample(_SAMPLE, now_s, 0.5)

    def fairness(flow: Flow, now_s: float) -> None:
        key = policy.key(flow)
        policy.activate(key, flow, now_s)
        chosen = policy.pick(now_s)
        policy.charge(chosen, flow, flow.cost, now_s)
        policy.deactivate(key, now_s)

    def backpressure(flow: Flow, now_s: float) -> None:
        policy.may_wait(flow, _VIEW, now_s)
        policy.may_start(flow, 0.01, _VIEW, now_s)
        policy.retry_after_s(flow, _VIEW, now_s, 0.5)

    def routing(flow: Flow, now_s: float) -> None:
        for endpoint in _ENDPOINTS:
            policy.score(flow, endpoint, now_s)
        policy.chosen(flow, _ENDPOINTS[0], now_s)

    def batching(flow: Flow, now_s: float) -> None:
        policy.wait_s(BatchView(3, 8, 0.001, 30.0, 1, 500.0), now_s)
        policy.on_batch(3, 0.01, now_s)

    def classify(flow: Flow, now_s: float) -> None:
        policy.classify(Step("s", flow.tenant, flow.kind, flow.target, Payload(), 1.7e9, flow.lane, flow.run), flow)

    def observer(flow: Flow, now_s: float) -> None:
        policy.rejected(flow, "some_policy", "QUEUE_FULL", now_s)
        policy.ended(flow, _SAMPLE, now_s)

    if slot is Slot.BATCHING:
        policy.serves(ModelView("x", 8, False, 2))
    several: dict[Slot, Callable[[Flow, float], object]] = {
        Slot.ADMISSION: admission,
        Slot.LIMIT: limit,
        Slot.FAIRNESS: fairness,
        Slot.BACKPRESSURE: backpressure,
        Slot.ROUTING: routing,
        Slot.BATCHING: batching,
        Slot.CLASSIFY: classify,
        Slot.OBSERVER: observer,
        Slot.ORDERING: lambda flow, now_s: policy.key(flow, now_s, _VIEW),
        Slot.CREDITS: lambda flow, now_s: policy.window(CreditView(flow.tenant, 10, 1, 200, 3, 0.01), now_s),
        Slot.HEAD_SAMPLING: lambda flow, now_s: policy.probability(flow, None, now_s),
        Slot.TAIL_SAMPLING: lambda flow, now_s: policy.keep(TraceSummary(flow, True, 0.1, 1, "", 5, 2000), now_s, 0.5),
        Slot.REDACTION: lambda flow, now_s: policy.redact({"tenant": flow.tenant}),
    }
    return several[slot]


def flow_of(number: int) -> Flow:
    return Flow(f"t{number}", "x", Kind.TOOL, Lane.STANDARD, f"r{number}", 1e9, 1.0)


def sizes(slot: Slot, policy: Any, counts: tuple[int, ...]) -> list[int]:
    """Bytes after each of these many steps, each of a tenant and a run of its own, a millisecond apart."""
    decide, done, found = decision(slot, policy), 0, []
    for count in counts:
        for number in range(done, count):
            decide(flow_of(number), 1000.0 + number * 1e-3)
        done = count
        found.append(size_bytes(policy))
    return found


def cost_us(slot: Slot, policy: Any, flows: int, rounds: int = 5, calls: int = 2000) -> float:
    """Microseconds for all that is done about one step, the best of some rounds, with so many flows known to the policy.

    For fairness they all have something waiting, with one more that comes and goes.
    """
    decide, known = decision(slot, policy), [flow_of(number) for number in range(flows)]
    now_s = 1000.0
    if slot is Slot.FAIRNESS:
        for flow in known:
            policy.activate(policy.key(flow), flow, now_s)
        known = [flow_of(number) for number in range(flows, flows + 64)]
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter_ns()
        for number in range(calls):
            now_s += 1e-4
            decide(known[number % len(known)], now_s)
        best = min(best, (time.perf_counter_ns() - began) / calls / 1e3)
    return best


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds for all that the policy is asked about one step, with few and with many flows."""

    few_us: float
    many_us: float

    @property
    def findings(self) -> list[str]:
        found = []
        if self.many_us > MOST_US:
            found.append(f"a step costs {self.many_us:.1f} us with {MANY_FLOWS} flows: {MOST_US:.0f} are allowed")
        if self.many_us > MOST_GROWTH * self.few_us + NOISE_US:
            found.append(f"a step costs {self.few_us:.1f} us with {FEW_FLOWS} flows and {self.many_us:.1f} us with {MANY_FLOWS}")
        return found


def measure(policy_type: PolicyType, config: Any = None) -> Cost:
    """On this machine, now: the numbers of a busy machine mean little."""
    config = policy_type.config() if config is None else config
    few, many = (cost_us(policy_type.slot, policy_type.build(config), flows) for flows in (FEW_FLOWS, MANY_FLOWS))
    return Cost(few, many)

"""Plays the part of the kernel with a policy: calls in the order that the contract allows, with random input, every answer checked."""

import copy
import math
import random
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from gateway.core import containment as c
from gateway.policy import Admit, BatchView, CreditView, Ending, ModelView, Reject, Sample, ScopeView, Slot, TraceSummary
from gateway.types import LANE_TIER, LANES, TIERS, BatchCost, Endpoint, Flow, Kind, Payload, Step

_REASON = re.compile(r"[A-Z][A-Z0-9_]*")
SCOPE = "tool.x"


class Broken(Exception):
    """A call that the policy failed; the text says which and why."""


class Play:
    """`answers` collects what the policy said, comparable between two plays with the same seed.

    still: time stands still. fresh: every step is of a tenant and run that was never there before. watch: raise Broken when it changes
    what it is given.
    """

    def __init__(self, slot: Slot, policy: Any, seed: int = 1, *, still: bool = False, fresh: bool = False, watch: bool = False) -> None:
        self.answers: list[Any] = []
        self.now_s = 0.0 if still else 1000.0
        self._slot, self._policy = slot, policy
        self._random = random.Random(seed)
        self._still, self._fresh, self._watch = still, fresh, watch
        self._steps = 0
        self._admitted: list[tuple[Flow, Any]] = []
        self._active: dict[Hashable, list[Flow]] = {}
        if slot is Slot.BATCHING:
            self._call("serves", c.a_truth, ModelView("x", 8, False, 2))

    def run(self, steps: int) -> "Play":
        """Raises Broken."""
        step: Callable[[], None] = getattr(self, f"_{self._slot.value}")
        for _ in range(steps):
            self._steps += 1
            if not self._still:
                self.now_s += self._pick(0.0, 1e-4, self._random.expovariate(20.0), self._random.expovariate(1.0))
            step()
        return self

    # ---- one step of each slot -------------------------------------------------------------------------------------------------

    def _classify(self) -> None:
        flow = self.flow()
        lane, data = flow.lane, self._pick(b"{}", b'{"a": [1, 2, 3]}', b"\x00" * 100)
        step = Step("s1", flow.tenant, flow.kind, flow.target, Payload(data), 1.7e9, lane, flow.run)
        self._call("classify", c.a_flow_of(flow), step, flow)

    def _admission(self) -> None:
        flow = self.flow()
        decision = self._call("decide", _a_good_decision, flow, self.view(), self.now_s, self._number())
        if isinstance(decision, Admit):
            self._admitted.append((flow, decision.state))
        while self._admitted and (len(self._admitted) > 40 or self._random.random() < 0.4):
            flow, state = self._admitted.pop(self._random.randrange(len(self._admitted)))
            if self._random.random() < 0.2:
                self._call("release", None, flow, state, self.now_s)
            else:
                self._call("ended", None, flow, state, self.sample(flow), self.now_s)

    def _limit(self) -> None:
        most = self._call("limit", c.a_count, SCOPE)
        self._call("on_sample", None, self.sample(self.flow(), most), self.now_s, self._number())

    def _fairness(self) -> None:
        if not self._active or self._random.random() < 0.5:
            flow = self.flow()
            key = self._call("key", c.a_key, flow)
            if key not in self._active:
                self._active[key] = []
                self._call("activate", None, key, flow, self.now_s)
            self._active[key].append(flow)
            return
        key = self._call("pick", c.a_key, self.now_s)
        if key not in self._active:
            raise Broken(f"pick() chose {key!r}, which is not active")
        flow = self._active[key].pop()
        if not self._active[key]:
            del self._active[key]
            self._call("deactivate", None, key, self.now_s)
        self._call("charge", None, key, flow, flow.cost, self.now_s)
        self._call("charge", None, key, flow, flow.cost * (self._number() - 0.5), self.now_s)

    def _ordering(self) -> None:
        self._call("key", c.an_order, self.flow(), self.now_s, self.view())

    def _backpressure(self) -> None:
        flow, view = self.flow(), self.view()
        wait_s = self._call("may_wait", c.a_time_or_none, flow, view, self.now_s)
        if wait_s is not None:
            self._call("may_start", c.a_truth, flow, min(wait_s, self._pick(0.0, 0.01, 1.0)), view, self.now_s)
        self._call("retry_after_s", _a_hint, flow, view, self.now_s, self._number())

    def _credits(self) -> None:
        sessions, outstanding = self._pick(1, 2, 100, 10_000), self._pick(0, 1, 64, 5000)
        view = CreditView(self._tenant(), sessions, 1, sessions * 10 + outstanding, outstanding, self._pick(0.0, 0.001, 0.5, 30.0))
        self._call("window", c.a_count, view, self.now_s)

    def _routing(self) -> None:
        if not isinstance(getattr(self._policy, "weight", None), int | float) or not self._policy.weight >= 0:
            raise Broken(f"weight is {getattr(self._policy, 'weight', None)!r}, not a number of at least 0")
        flow = self.flow()
        endpoints = [
            Endpoint(region, self._pick(0, 1, 5), self._pick(0, 1, 16), self._pick(0, 3, 100), 0.03 * place, place == 0, self._pick(0, 9))
            for place, region in enumerate("abc")
        ]
        scores = [(self._call("score", c.a_number_or_none, flow, endpoint, self.now_s), endpoint) for endpoint in endpoints]
        possible = [(score, endpoint) for score, endpoint in scores if score is not None]
        if possible:
            self._call("chosen", None, flow, max(possible, key=lambda one: one[0])[1], self.now_s)

    def _batching(self) -> None:
        size = self._pick(1, 2, 7, 8)
        slack_s = self._pick(-1.0, 0.0, 0.01, 30.0, math.inf)
        view = BatchView(size, 8, self._pick(0.0, 0.001, 2.0), slack_s, self._pick(0, 1, 2), self._pick(0.0, 5.0, 5000.0))
        self._call("wait_s", _a_finite_time, view, self.now_s)
        self._call("on_batch", None, size, self._pick(0.0, 0.001 * size + 0.002, 1.0), self.now_s)
        self._call("learnt", _a_cost)

    def _head_sampling(self) -> None:
        self._call("probability", c.a_probability, self.flow(), self._pick(None, True, False), self.now_s)

    def _tail_sampling(self) -> None:
        ok = self._random.random() < 0.8
        summary = TraceSummary(self.flow(), ok, self._pick(0.0, 0.1, 60.0), self._pick(1, 3), "" if ok else "TOOL_FAILED", 5, 2000)
        self._call("keep", c.a_truth, summary, self.now_s, self._number())

    def _redaction(self) -> None:
        attributes = {"tenant": self._tenant(), "input": "x" * self._pick(0, 10, 5000)}
        self._call("redact", _texts, attributes)

    def _observer(self) -> None:
        flow = self.flow()
        self._call("rejected", None, flow, "some_policy", "QUEUE_FULL", self.now_s)
        self._call("ended", None, flow, self.sample(flow), self.now_s)

    # ---- input -----------------------------------------------------------------------------------------------------------------

    def flow(self) -> Flow:
        lane = self._pick(*LANES)
        cost, deadline_s = self._pick(1e-3, 1.0, 2.5, 1e6), self.now_s + self._pick(-1.0, 0.0, 0.5, 30.0, math.inf)
        tier = LANE_TIER[lane] if self._random.random() < 0.7 else self._random.randrange(TIERS)
        run = f"r{self._steps}" if self._fresh else self._pick("", "r1", "r2", "r3")
        favoured = self._pick(True, False)
        return Flow(self._tenant(), "x", Kind.TOOL, lane, run, deadline_s, cost, tier, self._pick("", "a"), favoured)

    def view(self) -> ScopeView:
        waiting, service_s = self._pick(0, 0, 1, 10, 5000), self._pick(0.0, 0.001, 0.1, 20.0)
        oldest_s = self._random.random() if waiting else 0.0
        inflight, drain_per_s = self._pick(0, 1, 8, 5000), self._pick(0.0, 0.1, 5000.0)
        return ScopeView(SCOPE, inflight, self._pick(1, 8, 1_000_000), waiting, oldest_s, drain_per_s, service_s * 1.5, service_s)

    def sample(self, flow: Flow, most: int = 8) -> Sample:
        ending = self._pick(Ending.SUCCEEDED, Ending.SUCCEEDED, Ending.IGNORED, Ending.DROPPED)
        service_s, queue_s = self._pick(0.0, 0.001, 0.1, 20.0), self._pick(0.0, 0.0, 0.05, 5.0)
        inflight, wait_s = self._random.randint(1, max(1, min(most, 1000))), self._pick(0.0, 0.01)
        return Sample(
            SCOPE, ending, service_s + queue_s, queue_s, service_s, inflight, flow.cost * self._pick(0.2, 1.0, 5.0), wait_s, wait_s
        )

    def _tenant(self) -> str:
        return f"t{self._steps}" if self._fresh else self._pick("acme", "beta", "t1", "t2")

    def _number(self) -> float:
        return float(self._pick(0.0, 0.5, self._random.random(), 1 - 1e-9))

    def _pick(self, *values: Any) -> Any:
        return values[self._random.randrange(len(values))]

    # ---- calls -----------------------------------------------------------------------------------------------------------------

    def _call(self, method: str, check: Callable[[Any], Any] | None, *arguments: Any) -> Any:
        before = copy.deepcopy(arguments) if self._watch and method not in ("release", "ended") else None
        try:
            answer = getattr(self._policy, method)(*arguments)
        except Exception as error:
            raise Broken(f"{method}{_shown(arguments)} raised {type(error).__name__}: {error}") from error
        if before is not None and before != arguments:
            raise Broken(f"{method}() changed what it was given: {_shown(before)} became {_shown(arguments)}")
        if check is None:
            return answer
        try:
            answer = check(answer)
        except (TypeError, ValueError) as error:
            raise Broken(f"{method}{_shown(arguments)}: {error}") from None
        self.answers.append(("Admit", answer.favoured) if isinstance(answer, Admit) else answer)  # its state is the policy's own
        return answer


def _shown(arguments: tuple[Any, ...]) -> str:
    return "(" + ", ".join(map(repr, arguments)) + ")"


# ---- what the kernel would let pass and an author would regret -----------------------------------------------------------------


def _a_good_decision(answer: Any) -> Admit | Reject:
    decision = c.a_decision(answer)
    if isinstance(decision, Reject):
        if not _REASON.fullmatch(decision.reason):
            raise ValueError(f"the reason {decision.reason!r} is not UPPER_SNAKE_CASE")
        if not decision.message:
            raise ValueError(f"{decision.reason} has no message: who is refused wants to know why")
        _a_hint(decision.retry_after_s)
    return decision


def _a_hint(answer: Any) -> float | None:
    return None if answer is None else _a_finite_time(answer)


def _a_finite_time(answer: Any) -> float:
    if c.a_time(answer) == math.inf:
        raise ValueError("it returned infinity: nobody can wait that long")
    return float(answer)


def _a_cost(answer: Any) -> BatchCost | None:
    if answer is not None and not isinstance(answer, BatchCost):
        raise TypeError(f"it returned {answer!r}, not a BatchCost or None")
    return answer


def _texts(answer: Any) -> Mapping[str, str]:
    if not isinstance(answer, Mapping) or not all(isinstance(part, str) for item in answer.items() for part in item):
        raise TypeError(f"it returned {answer!r}, not texts by name")
    return answer

"""Question: which run has got least so far?

Least attained service over whole runs: the run that has received the least service goes first, so short runs overtake long ones without
anybody knowing their length. It shortens the mean completion when lengths are heavy-tailed. After PLAS in "Autellix: An Efficient Serving
Engine for LLM Agents as General Programs" (Luo et al., 2025); the rule for a single queue is Kleinrock's foreground-background.

    priority = cost received by all steps of the run so far
    promoted once waited_s / received >= beta_s: promoted runs go first, the one that reached it longest ago before others

A run that has received nothing is promoted at once, so new ones go first come first served. waited_s counts from the last dispatch of the
run, or from when it began to wait. A step without a run counts as a run of its own. There are no shares for tenants here: whoever
cuts work into many runs gets more, so it is for tenants that trust each other; otherwise use `vtc`.

State: one record for each active run, and the service of at most `max_runs` others, which lie between two steps or have ended, the least
recently charged one dropped. A dropped run counts as new.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from gateway import Flow, PolicyType, Slot, hookimpl
from gateway.core.keyed_heap import KeyedHeap


@dataclass(frozen=True)
class LasConfig:
    """beta_s: seconds of waiting for each cost unit received after which a run is promoted; smaller is closer to first come first served.
    max_runs: that have nothing waiting and are remembered, for each target and tier."""

    beta_s: float = 30.0
    max_runs: int = 10_000

    def __post_init__(self) -> None:
        if self.beta_s <= 0:
            raise ValueError("beta_s must be positive")
        if self.max_runs < 1:
            raise ValueError("max_runs must be at least 1")


class Las:
    def __init__(self, config: LasConfig) -> None:
        self._config = config
        self._received = KeyedHeap()  # active runs by service
        self._promoted = KeyedHeap()  # the same by when they are promoted
        self._since_s: dict[Hashable, float] = {}  # active runs: waiting since
        self._idle: OrderedDict[Hashable, float] = OrderedDict()
        self._picked: Hashable = None
        self._single = 0

    def reconfigure(self, config: LasConfig) -> None:
        self._config = config
        self._bound()
        for key in self._since_s:
            self._place(key, self._service(key))

    def key(self, flow: Flow) -> Hashable:
        if flow.run:
            return flow.tenant, flow.run
        self._single += 1
        return self._single  # a number: nothing comes after it that would have to be remembered

    def activate(self, key: Hashable, flow: Flow, now_s: float) -> None:
        self._since_s[key] = now_s
        self._place(key, self._idle.pop(key, 0.0))

    def deactivate(self, key: Hashable, now_s: float) -> None:
        if self._since_s.pop(key, None) is None:
            return
        self._remember(key, self._service(key))
        self._received.remove(key)
        self._promoted.remove(key)

    def pick(self, now_s: float) -> Hashable:
        key, (promoted_s, *_) = self._promoted.first()
        if promoted_s > now_s:
            key = self._received.first()[0]
        self._picked = key
        return key

    def charge(self, key: Hashable, flow: Flow, cost: float, now_s: float) -> None:
        if key in self._since_s:
            if key == self._picked:  # the dispatch; other charges correct earlier ones
                self._since_s[key], self._picked = now_s, None
            self._place(key, max(0.0, self._service(key) + cost))
        else:
            self._remember(key, max(0.0, self._idle.pop(key, 0.0) + cost))

    def _service(self, key: Hashable) -> float:
        priority = self._received.get(key)
        return priority[0] if priority else 0.0

    def _place(self, key: Hashable, received: float) -> None:
        self._received.set(key, (received,))
        self._promoted.set(key, (self._since_s[key] + self._config.beta_s * received,))

    def _remember(self, key: Hashable, received: float) -> None:
        if not isinstance(key, int):
            self._idle[key] = received
            self._bound()

    def _bound(self) -> None:
        while len(self._idle) > self._config.max_runs:
            self._idle.popitem(last=False)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("las", Slot.FAIRNESS, LasConfig, Las, "the run that has received the least service first")]

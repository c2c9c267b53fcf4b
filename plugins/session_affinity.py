"""Question: where did this run's last step for the target go?

There, while the pin holds: what the last step left behind (a model's key-value cache, warm connections) is worth most right after it, and
86 % of the turns of one agent come back within a second. Score: 1 for the pinned endpoint, 0 for the others, so the pin is a bonus on
top of what other policies say; the default weight of 2 outdoes nearest_region's preference for the home region. A pin is given up when
its endpoint has no workers or more than `max_load` steps for each slot, and the run is pinned to where its step goes instead.

An endpoint is a region today. Routing does not hear when a step ends, so `pin_s` counts from the dispatch of the last step: for targets
that take long, add what a step takes. State: one pin for each tenant, run and target, the least recently used one dropped beyond
`max_pins`. Steps without a run are not pinned.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Endpoint, Flow, PolicyType, Slot, hookimpl


@dataclass(frozen=True)
class SessionAffinityConfig:
    """weight: of this score among those of other routing policies. pin_s: how long a pin holds after the dispatch of the run's last step.
    max_load: steps for each slot beyond which the pin is given up. max_pins: that are remembered."""

    weight: float = 2.0
    pin_s: float = 1.0
    max_load: float = 1.5
    max_pins: int = 50_000

    def __post_init__(self) -> None:
        if self.weight < 0 or self.pin_s <= 0 or self.max_load <= 0 or self.max_pins < 1:
            raise ValueError("weight must not be negative, pin_s, max_load and max_pins must be positive")


_Key = tuple[str, str, str]


class SessionAffinity:
    def __init__(self, config: SessionAffinityConfig) -> None:
        self._pins: OrderedDict[_Key, tuple[str, float]] = OrderedDict()  # region, and until when
        self.reconfigure(config)

    def reconfigure(self, config: SessionAffinityConfig) -> None:
        self._config = config
        self.weight = config.weight

    def score(self, flow: Flow, endpoint: Endpoint, now_s: float) -> float | None:
        if endpoint.workers == 0:
            return None
        pin = self._pins.get(_key(flow)) if flow.run else None
        if pin is None or pin[0] != endpoint.region or now_s >= pin[1] or endpoint.load > self._config.max_load:
            return 0.0
        return 1.0

    def chosen(self, flow: Flow, endpoint: Endpoint, now_s: float) -> None:
        if not flow.run:
            return
        key, config = _key(flow), self._config
        self._pins[key] = endpoint.region, now_s + config.pin_s
        self._pins.move_to_end(key)
        while len(self._pins) > config.max_pins:
            self._pins.popitem(last=False)


def _key(flow: Flow) -> _Key:
    return flow.tenant, flow.run, flow.scope


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("session_affinity", Slot.ROUTING, SessionAffinityConfig, SessionAffinity, "a run goes where its last step went")]

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.faults import Faults
from gateway.core.gate import Gate, GatePolicies, Ticket
from gateway.policy import Named, OnError, Slot
from gateway.types import Flow, Kind, Lane
from plugins.bounded_wait import BoundedWait, BoundedWaitConfig
from plugins.fixed_limit import FixedLimit, FixedLimitConfig


def named(slot: Slot, policy: object) -> Named:
    return Named(type(policy).__name__, slot, policy, OnError.ADMIT)


def make_gate(limit: int, max_waiting: int = 1000, fairness: object | None = None) -> tuple[Gate, list[Exception]]:
    raised: list[Exception] = []
    policies = GatePolicies(
        limits=[named(Slot.LIMIT, FixedLimit(FixedLimitConfig(limit=limit)))],
        backpressure=[named(Slot.BACKPRESSURE, BoundedWait(BoundedWaitConfig(max_waiting=max_waiting)))],
        fairness=named(Slot.FAIRNESS, fairness) if fairness else None,
    )
    return Gate("tool.x", policies, Faults(lambda _, error: raised.append(error)), lambda: 0.5), raised


def ticket(lane: Lane = Lane.STANDARD, tenant: str = "t", at_s: float = 0.0, woken: list[Ticket] | None = None) -> Ticket:
    made = Ticket(Flow(tenant, "x", Kind.TOOL, lane), at_s)
    made.wake = lambda: woken.append(made) if woken is not None else None
    return made


def test_grants_up_to_the_limit_then_queues_then_refuses() -> None:
    gate, _ = make_gate(limit=2, max_waiting=1)
    tickets = [ticket() for _ in range(4)]
    rejects = [gate.offer(t, 0.0) for t in tickets]
    assert [t.waiting for t in tickets] == [False, False, True, False]
    assert rejects[:3] == [None, None, None]
    assert rejects[3]
    assert rejects[3].reason == "QUEUE_FULL"
    assert rejects[3].scope == "tool.x"
    assert rejects[3].retry_after_s is None, "no hint while no drain rate is known"


def test_the_hint_is_the_measured_drain_time() -> None:
    gate, _ = make_gate(limit=1, max_waiting=1)
    for index in range(200):
        assert gate.offer(ticket(), index * 0.1) is None
        gate.release(index * 0.1 + 0.1, completed=True)
    for _ in range(2):
        gate.offer(ticket(), 20.0)
    hint = gate.retry_after_s(ticket().flow, 20.0)
    assert hint is not None
    assert 0.15 < hint < 0.35, "two waiting places at ten a second, and up to half more"


def test_lanes_go_in_their_order_and_tickets_by_arrival() -> None:
    gate, _ = make_gate(limit=1)
    woken: list[Ticket] = []
    gate.offer(ticket(), 0.0)
    order = [Lane.BATCH, Lane.STANDARD, Lane.INTERACTIVE, Lane.BATCH, Lane.INTERACTIVE]
    tickets = [ticket(lane, woken=woken) for lane in order]
    for t in tickets:
        gate.offer(t, 0.0)
    for _ in tickets:
        gate.release(1.0, completed=True)
    assert woken == [tickets[2], tickets[4], tickets[1], tickets[0], tickets[3]]


def test_a_policy_that_raises_does_not_stop_the_gate() -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise ZeroDivisionError(name)

    gate, raised = make_gate(limit=1, fairness=Broken())
    woken: list[Ticket] = []
    gate.offer(ticket(), 0.0)
    waiting = ticket(woken=woken)
    gate.offer(waiting, 0.0)
    gate.release(1.0, completed=True)
    assert woken == [waiting]
    assert raised


class RoundRobin:
    """The smallest fairness policy: keys take turns."""

    def __init__(self) -> None:
        self.active: list[object] = []

    def key(self, flow: Flow) -> object:
        return flow.tenant

    def activate(self, key: object, flow: Flow, now_s: float) -> None:
        self.active.append(key)

    def deactivate(self, key: object, now_s: float) -> None:
        self.active.remove(key)

    def pick(self, now_s: float) -> object:
        self.active.append(self.active.pop(0))
        return self.active[-1]

    def charge(self, key: object, flow: Flow, cost: float, now_s: float) -> None:
        pass


def test_fairness_picks_the_flow() -> None:
    gate, raised = make_gate(limit=1, fairness=RoundRobin())
    woken: list[Ticket] = []
    gate.offer(ticket(), 0.0)
    for tenant in "aaab":
        gate.offer(ticket(tenant=tenant, woken=woken), 0.0)
    for _ in range(4):
        gate.release(1.0, completed=True)
    assert [t.flow.tenant for t in woken] == ["a", "b", "a", "a"]
    assert not raised


actions = st.lists(
    st.tuples(st.sampled_from(["offer", "release", "abandon"]), st.integers(0, 50), st.sampled_from(list(Lane))), max_size=120
)


@given(actions, st.integers(1, 5), st.integers(0, 8), st.booleans())
def test_counts_never_leak(script: list[tuple[str, int, Lane]], limit: int, max_waiting: int, fair: bool) -> None:
    gate, raised = make_gate(limit, max_waiting, RoundRobin() if fair else None)
    woken: list[Ticket] = []
    granted: list[Ticket] = []
    waiting: list[Ticket] = []
    now_s = 0.0
    for action, pick, lane in script:
        now_s += 0.01
        if action == "offer":
            t = ticket(lane, tenant=f"t{pick % 3}", at_s=now_s, woken=woken)
            if gate.offer(t, now_s) is None:
                (waiting if t.waiting else granted).append(t)
        elif action == "release" and granted:
            granted.pop(pick % len(granted))
            gate.release(now_s, completed=True)
        elif action == "abandon" and waiting:
            assert gate.abandon(waiting.pop(pick % len(waiting)), now_s)
        for t in woken:
            waiting.remove(t)
            granted.append(t)
        woken.clear()
        assert gate.inflight == len(granted) <= limit
        assert gate.waiting == len(waiting) <= max_waiting
        assert not waiting or gate.inflight == limit, "nobody waits while there is room"
    assert not raised

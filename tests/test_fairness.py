"""Fairness policies: the formulas at known inputs, then the bounds that they promise, through the queue of the gate itself."""

from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.containment import Containment
from gateway.core.keyed_heap import KeyedHeap
from gateway.core.permit import Permit
from gateway.core.shares import Shares
from gateway.core.tier_queue import TierQueue
from gateway.policy import FairnessPolicy, Named, OnError, Slot
from gateway.types import Flow, Kind, Lane
from plugins.drr import Drr, DrrConfig
from plugins.las import Las, LasConfig
from plugins.vtc import Vtc, VtcConfig

FLOW = Flow("a", "x", Kind.TOOL, Lane.STANDARD)


def of(tenant: str, run: str = "", cost: float = 1.0) -> Flow:
    return replace(FLOW, tenant=tenant, run=run, cost=cost)


class Line:
    """`slots` places and a queue in front of them, as in a gate; what is charged to each key is added up, by its weight."""

    def __init__(self, policy: FairnessPolicy, slots: int = 1, weights: dict[str, float] | None = None) -> None:
        def report(named: Named, what: str) -> None:
            raise AssertionError(what)

        self.queue = TierQueue(Named("fair", Slot.FAIRNESS, policy, OnError.ADMIT), Containment(report, lambda: 0.0))
        self.slots, self.weights = slots, weights or {}
        self.inflight: list[tuple[Permit, float]] = []
        self.waiting: Counter[str] = Counter()
        self.service: defaultdict[str, float] = defaultdict(float)
        self.granted: list[Flow] = []
        self.real: dict[int, float] = {}
        self.now_s = 0.0

    def offer(self, flow: Flow, real: float | None = None) -> None:
        permit = Permit(flow, self.now_s)
        self.real[id(permit)] = flow.cost if real is None else real
        if len(self.inflight) < self.slots and not self.queue.waiting:
            self._grant(permit)
        else:
            self.waiting[flow.tenant] += 1
            self.queue.add(permit, (0.0,), self.now_s)

    def end(self, index: int = 0) -> None:
        permit, real = self.inflight.pop(index)
        self._charge(permit, real - permit.flow.cost)
        while self.queue.waiting and len(self.inflight) < self.slots:
            following = self.queue.next(self.now_s)
            self.waiting[following.flow.tenant] -= 1
            self._grant(following)

    def tenants(self, steps: int) -> str:
        for _ in range(steps):
            self.end()
        return "".join(flow.tenant for flow in self.granted[-steps:])

    def _grant(self, permit: Permit) -> None:
        self.inflight.append((permit, self.real.pop(id(permit))))
        self.granted.append(permit.flow)
        self._charge(permit, permit.flow.cost)

    def _charge(self, permit: Permit, cost: float) -> None:
        self.queue.charge(permit, cost, self.now_s)
        self.service[permit.flow.tenant] += cost / self.weights.get(permit.flow.tenant, 1.0)


def test_keyed_heap_gives_the_smallest_and_equal_ones_by_when_they_were_set() -> None:
    heap = KeyedHeap()
    for key, priority in [("a", 3.0), ("b", 1.0), ("c", 1.0), ("b", 1.0), ("d", 9.0)]:
        heap.set(key, (priority,))
    assert heap.first() == ("c", (1.0,))
    assert heap.remove("c") == (1.0,)
    assert heap.remove("c") is None
    assert heap.first() == ("b", (1.0,))
    heap.set("b", (4.0,))
    assert (heap.first()[0], heap.get("b"), len(heap), "c" in heap) == ("a", (4.0,), 3, False)
    with pytest.raises(IndexError):
        KeyedHeap().first()


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 9)))))
def test_keyed_heap_is_a_sorted_mapping_of_bounded_size(script: list[tuple[int, int | None]]) -> None:
    heap, model = KeyedHeap(), dict[int, float]()
    for key, priority in script * 5:
        if priority is None:
            heap.remove(key)
            model.pop(key, None)
        else:
            heap.set(key, (priority,))
            model[key] = priority
        assert len(heap) == len(model)
        assert not model or heap.first()[1] == (min(model.values()),)
        assert len(heap._heap) <= 2 * 6 + 64


# ---- virtual token counter -----------------------------------------------------------------------------------------------------


def test_vtc_shares_by_cost_and_weight() -> None:
    line = Line(Vtc(VtcConfig(tenants={"b": 2.0})))
    line.offer(of("z"))
    for _ in range(12):
        line.offer(of("a"))
        line.offer(of("b"))
        line.offer(of("c", cost=4.0))
    # Counters a b c by hand: (0 0 0) a (1 0 0) b (1 .5 0) c (1 .5 4) b (1 1 4) then a, charged longer ago, and so on.
    assert line.tenants(8) == "abcbabba"
    line.tenants(9)
    shares = Counter(flow.tenant for flow in line.granted[1:])
    assert shares["b"] == pytest.approx(2 * shares["a"], abs=1)
    assert 4 * shares["c"] == pytest.approx(shares["a"], abs=4)


def test_vtc_a_tenant_that_comes_is_lifted_to_the_smallest_active_one_and_goes_first_among_equals() -> None:
    line = Line(Vtc(VtcConfig()))
    for _ in range(10):
        line.offer(of("a"))
    line.tenants(5)
    for _ in range(3):
        line.offer(of("b"))
    assert line.tenants(6) == "bababa", "no more for b than for a, although a has had six before"


def test_vtc_keeps_debt_over_an_absence() -> None:
    line = Line(Vtc(VtcConfig()))
    line.offer(of("z"))
    for _ in range(8):
        line.offer(of("b"))
    line.offer(of("a", cost=5.0))
    assert line.tenants(2) == "ba"  # a has left with a counter of 5
    line.offer(of("a"))
    assert line.tenants(6) == "bbbbab"


def test_vtc_idle_capacity_used_alone_is_no_debt() -> None:
    line = Line(Vtc(VtcConfig()))
    for _ in range(1000):
        line.offer(of("a"))
        line.end()
    line.offer(of("b"))
    for _ in range(4):
        line.offer(of("b"))
        line.offer(of("a"))
    assert sorted(line.tenants(4)) == ["a", "a", "b", "b"]


def test_vtc_learns_the_real_cost_at_the_end() -> None:
    line = Line(Vtc(VtcConfig()))
    line.offer(of("z"))
    for _ in range(6):
        line.offer(of("a"), real=3.0)
        line.offer(of("b"), real=0.5)
    assert line.tenants(7) == "abbbbbb", "one step of 3 for six of a half"


def test_vtc_forgets_within_its_bound_and_without_gain_for_the_forgotten() -> None:
    policy = Vtc(VtcConfig(max_idle=3))
    policy.activate("x", of("x"), 0.0)  # waits all the time, at 0
    for tenant, cost in [("a", 50.0), ("b", 40.0), ("c", 30.0), ("d", 20.0)]:
        policy.charge(tenant, of(tenant), cost, 0.0)
    assert (len(policy._idle), "d" in policy._idle) == (3, False), "the smallest debt is forgotten"
    for tenant in "da":
        policy.activate(tenant, of(tenant), 0.0)
    policy.charge("x", of("x"), 19.0, 0.0)
    assert policy.pick(0.0) == "x", "d owes 20, forgotten or not"
    policy.charge("x", of("x"), 2.0, 0.0)
    assert policy.pick(0.0) == "d"
    policy.reconfigure(VtcConfig(max_idle=1))
    assert len(policy._idle) == 1


# ---- deficit round robin -------------------------------------------------------------------------------------------------------


def test_drr_takes_turns_of_a_quantum() -> None:
    line = Line(Drr(DrrConfig(quantum=2.0, tenants={"b": 2.0})))
    line.offer(of("z"))
    for _ in range(12):
        line.offer(of("a"))
        line.offer(of("b"))
        line.offer(of("c", cost=5.0))
    # c spends 5 of its 2: the deficit is -3, and 1 two rounds later, so it misses a turn. Then -4, and 2 three rounds later.
    assert line.tenants(20) == "aabbbbc" + "aabbbb" + "caabbbb"


def test_drr_idle_capacity_used_alone_is_no_debt_and_credit_lapses() -> None:
    line = Line(Drr(DrrConfig()))
    for _ in range(1000):
        line.offer(of("a"))
        line.end()
    line.offer(of("b"))
    for _ in range(4):
        line.offer(of("b"))
        line.offer(of("a"))
    assert sorted(line.tenants(4)) == ["a", "a", "b", "b"]


def test_drr_a_refund_gives_turns_back() -> None:
    policy = Drr(DrrConfig())
    for tenant in "ab":
        policy.activate(tenant, of(tenant), 0.0)
    assert policy.pick(0.0) == "a"
    policy.charge("a", of("a"), 10.0, 0.0)
    policy.charge("b", of("b"), 2.0, 0.0)
    assert policy.pick(0.0) == "b"
    policy.charge("a", of("a"), -9.0, 0.0)  # due in round 10 before, now in the present one, with what it had left of the first
    policy.charge("b", of("b"), 1.0, 0.0)
    for _ in range(2):
        assert policy.pick(0.0) == "a"
        policy.charge("a", of("a"), 1.0, 0.0)
    assert policy.pick(0.0) == "b"


def test_drr_is_bounded() -> None:
    policy = Drr(DrrConfig(max_idle=3))
    for tenant in "abcdef":
        policy.charge(tenant, of(tenant), 1.0, 0.0)
    assert list(policy._idle) == ["d", "e", "f"]


costs = st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 20).filter(bool), st.booleans()), min_size=1, max_size=60)


@given(costs)
def test_drr_conserves_what_rounds_give(script: list[tuple[str, float, bool]]) -> None:
    """For those that wait all the time: deficit = quantum * weight * rounds taken - charged, and it is always spendable."""
    policy = Drr(DrrConfig(quantum=3.0, tenants={"c": 2.0}))
    allowance = {"a": 3.0, "b": 3.0, "c": 6.0}
    charged: defaultdict[Hashable, float] = defaultdict(float)
    for tenant in "abc":
        policy.activate(tenant, of(tenant), 0.0)
    for tenant, cost, picked in script:
        key = policy.pick(0.0) if picked else tenant
        amount = abs(cost) if picked else cost
        policy.charge(key, of(str(key)), amount, 0.0)
        charged[key] += amount
        for name, turn in policy._turns.items():
            assert turn.deficit == pytest.approx(allowance[str(name)] * (turn.round + 1) - charged[name], abs=1e-6)
            assert turn.deficit > 0


# ---- least attained service ----------------------------------------------------------------------------------------------------


def test_las_serves_the_run_that_has_received_least() -> None:
    line = Line(Las(LasConfig(beta_s=1e9)))
    line.offer(of("t", "long"))
    for _ in range(5):
        line.offer(of("t", "long"))
    assert line.tenants(2) == "tt"
    line.offer(of("t", "short"))
    line.offer(of("u", "short"))
    for _ in range(4):
        line.end()
    assert [(flow.tenant, flow.run) for flow in line.granted[3:]] == [("t", "short"), ("u", "short"), ("t", "long"), ("t", "long")]


def test_las_remembers_a_run_between_its_steps_and_learns_its_real_cost() -> None:
    line = Line(Las(LasConfig(beta_s=1e9)))
    line.offer(of("t", "old"), real=3.0)
    line.end()
    line.offer(of("z"))
    line.offer(of("t", "old"))
    for _ in range(4):
        line.offer(of("u", "new"))
    line.tenants(5)
    assert [flow.run for flow in line.granted[2:]] == ["new", "new", "new", "old", "new"]


def test_las_promotes_a_run_that_waited_for_beta_times_its_service() -> None:
    policy = Las(LasConfig(beta_s=10.0))
    old, new = of("t", "old"), of("t", "new")
    policy.charge(policy.key(old), old, 2.0, 0.0)
    policy.charge(policy.key(new), new, 1.0, 0.0)
    policy.activate(policy.key(old), old, 0.0)
    policy.activate(policy.key(new), new, 15.0)
    assert policy.pick(19.9) == ("t", "new")
    assert policy.pick(20.0) == ("t", "old"), "2 units, 20 s"
    policy.charge(("t", "old"), old, 1.0, 20.0)
    assert policy.pick(20.0) == ("t", "new"), "the wait counts from the dispatch"
    policy.charge(("t", "old"), old, -1.0, 25.0)  # a correction, not a dispatch: 2 units since 20 s
    policy.charge(("t", "new"), new, 0.5, 30.0)  # the dispatch: 1.5 units since 30 s
    assert policy.pick(39.9) == ("t", "new")
    assert policy.pick(40.0) == ("t", "old")


def test_las_steps_without_a_run_stand_alone_and_leave_nothing_behind() -> None:
    policy = Las(LasConfig(max_runs=2))
    one, two = policy.key(of("t")), policy.key(of("t"))
    assert one != two
    policy.activate(one, of("t"), 0.0)
    policy.activate(two, of("t"), 0.0)
    assert policy.pick(0.0) == one
    for key in (one, two):
        policy.deactivate(key, 0.0)
        policy.charge(key, of("t"), 1.0, 0.0)
    assert not policy._idle
    assert not policy._since_s
    for run in "abc":
        policy.charge(("t", run), of("t", run), 1.0, 0.0)
    assert list(policy._idle) == [("t", "b"), ("t", "c")]
    policy.reconfigure(LasConfig(max_runs=1))
    assert list(policy._idle) == [("t", "c")]


def test_las_reconfigured_promotes_by_the_new_beta() -> None:
    policy = Las(LasConfig(beta_s=10.0))
    for run, cost in [("old", 2.0), ("new", 1.0)]:
        policy.charge(("t", run), of("t", run), cost, 0.0)
        policy.activate(("t", run), of("t", run), 0.0 if run == "old" else 5.0)
    policy.reconfigure(LasConfig(beta_s=3.0))
    assert policy.pick(6.0) == ("t", "old")


# ---- shares --------------------------------------------------------------------------------------------------------------------


def window_of(shares: Shares, cost: dict[str, float], served: float, from_s: float) -> None:
    for tenant, came in cost.items():
        shares.came(tenant, 3, came, from_s)
    shares.served(3, served)


def test_modest_is_who_asks_for_no_more_than_an_equal_share_of_what_was_served() -> None:
    shares = Shares(window_s=1.0)
    window_of(shares, {"elephant": 50.0, "mouse": 3.0, "late": 4.0}, 12.0, 0.0)  # an equal share is 4
    assert not shares.is_modest("mouse", 3), "nothing is known before a window is whole"
    for tenant in ("elephant", "mouse", "late", "new"):
        shares.came(tenant, 3, 1.0, 1.0)
    assert [name for name in ("elephant", "mouse", "late", "new") if shares.is_modest(name, 3)] == ["mouse", "late", "new"]
    shares.came("new", 3, 3.5, 1.5)
    assert not shares.is_modest("new", 3), "it has come with more by now"
    shares.came("mouse", 1, 1.0, 1.5)
    assert not shares.is_modest("mouse", 1), "tiers have shares of their own, and this one got nothing"


def test_shares_of_a_window_in_which_little_came_are_not_larger() -> None:
    shares = Shares(window_s=1.0)
    window_of(shares, {"a": 10.0, "b": 10.0}, 20.0, 0.0)
    shares.came("a", 3, 1.0, 10.0)  # 10 of 10 in ten seconds is 1 in one
    assert shares.is_modest("a", 3)
    shares.came("a", 3, 0.1, 10.1)
    assert not shares.is_modest("a", 3)


# ---- bounds --------------------------------------------------------------------------------------------------------------------

script = st.lists(
    st.tuples(
        st.sampled_from("aaabbbcd."),  # who sends a step; "." ends one
        st.sampled_from([0.25, 1.0, 2.0, 4.0]),  # its estimate, or which one ends
        st.sampled_from([0.0, 0.0, 1.0, 3.0]),  # what it costs more
    ),
    max_size=200,
)
WEIGHTS = {"b": 2.0, "d": 0.5}


@pytest.mark.parametrize("quantum", [None, 1.0, 5.0], ids=["vtc", "drr", "drr, long turns"])
@given(script, st.integers(1, 4))
def test_service_of_those_that_wait_all_the_time_differs_by_no_more_than_the_bound(
    quantum: float | None, script: list[tuple[str, float, float]], slots: int
) -> None:
    policy: FairnessPolicy = Vtc(VtcConfig(tenants=WEIGHTS)) if quantum is None else Drr(DrrConfig(quantum, tenants=WEIGHTS))
    line = Line(policy, slots, WEIGHTS)
    steps = [step for step in script if step[0] != "."]
    largest = max((cost / WEIGHTS.get(who, 1.0) for who, cost, _ in steps), default=0.0)
    error = max((more / WEIGHTS.get(who, 1.0) for who, _, more in steps), default=0.0)
    bound = 2 * (largest + slots * error + (quantum or 0.0)) + 1e-9
    ranges: dict[tuple[str, str], tuple[float, float]] = {}
    for who, cost, more in script:
        if who != ".":
            line.offer(of(who, cost=cost), cost + more)
        elif line.inflight:
            line.end(int(cost) % len(line.inflight))
        for pair in combinations("abcd", 2):
            if not all(line.waiting[tenant] for tenant in pair):
                ranges.pop(pair, None)
                continue
            gap = line.service[pair[0]] - line.service[pair[1]]
            low, high = ranges.get(pair, (gap, gap))
            ranges[pair] = low, high = min(low, gap), max(high, gap)
            assert high - low <= bound


@pytest.mark.parametrize("policy_type", [Vtc, Drr, Las])
def test_an_unknown_key_that_leaves_is_no_fault(policy_type: type[Vtc] | type[Drr] | type[Las]) -> None:
    configs = {Vtc: VtcConfig(), Drr: DrrConfig(), Las: LasConfig()}
    policy = policy_type(configs[policy_type])  # type: ignore[arg-type]
    policy.deactivate("nobody", 0.0)
    policy.charge("nobody", FLOW, -1.0, 0.0)
    with pytest.raises(LookupError):
        policy.pick(0.0)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (VtcConfig, {"weight": 0}),
        (VtcConfig, {"tenants": {"a": -1.0}}),
        (VtcConfig, {"max_idle": 0}),
        (DrrConfig, {"quantum": 0}),
        (DrrConfig, {"max_idle": 0}),
        (LasConfig, {"beta_s": 0}),
        (LasConfig, {"max_runs": 0}),
    ],
)
def test_values_out_of_range_are_refused(config: type, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        config(**wrong)

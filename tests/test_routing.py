"""Which region gets a step: candidates, the sum of scores, shadows, and what each routing policy is for."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from gateway.core.containment import Containment
from gateway.core.routing import choose, endpoints, known_round_trips
from gateway.policy import Named, OnError, Slot
from gateway.run_types import RoundTrips
from gateway.types import Endpoint, Flow, Kind, Lane, Target, WorkerInfo
from plugins.least_loaded import LeastLoaded, LeastLoadedConfig
from plugins.nearest_region import NearestRegion, NearestRegionConfig
from plugins.session_affinity import SessionAffinity, SessionAffinityConfig

FLOW = Flow("t", "x", Kind.TOOL, Lane.STANDARD, run="r1")
HOME = Endpoint("home", 1, 8, 0, 0.0, home=True)
NEAR = Endpoint("near", 1, 8, 0, 0.02, home=False)
FAR = Endpoint("far", 1, 8, 0, 0.3, home=False)
ALL = (FAR, HOME, NEAR)


def containment() -> Containment:
    return Containment(lambda named, what: None, lambda: 0.0)


def named(policy: object, name: str = "p", *, shadow: bool = False) -> Named:
    return Named(name, Slot.ROUTING, policy, OnError.ADMIT, shadow)


def region(*policies: object, among: Sequence[Endpoint] = ALL, flow: Flow = FLOW, now_s: float = 0.0) -> str:
    chosen = choose([named(policy, f"p{i}") for i, policy in enumerate(policies)], among, flow, now_s, containment())
    return chosen.region if chosen else ""


def having(inflight: int, *regions: str, among: Sequence[Endpoint] = ALL) -> tuple[Endpoint, ...]:
    return tuple(replace(e, inflight=inflight) if e.region in regions else e for e in among)


# ---- candidates ----------------------------------------------------------------------------------------------------------------


def worker(where: str, slots: int = 4, running: int = 0, *, draining: bool = False) -> WorkerInfo:
    return WorkerInfo(f"w-{where}", where, Kind.TOOL, ("tool.x",), slots, running, draining)


def test_an_endpoint_is_what_serves_the_target_in_a_region() -> None:
    target = Target(Kind.TOOL, "x", home_region="b", slots=16)
    other = WorkerInfo("w-other", "a", Kind.TOOL, ("tool.y",), slots=50)
    workers = [worker("a", 4, 1), worker("a", 4, 2), worker("b", 8, 3, draining=True), other]
    a, b = endpoints(target, ["a", "b"], workers, RoundTrips({("b", "a"): 0.08}), "a")
    assert a == Endpoint("a", workers=2, slots=8, running=3, round_trip_s=0.0, home=False)
    assert b == Endpoint("b", workers=0, slots=0, running=0, round_trip_s=0.08, home=True)


def test_a_worker_with_many_targets_counts_with_this_ones_part() -> None:
    (found,) = endpoints(Target(Kind.TOOL, "x", slots=16), ["a"], [worker("a", 160, 40)], RoundTrips(), "a")
    assert (found.slots, found.running) == (16, 4)
    assert found.load == 0.25
    assert replace(found, inflight=20).load == 1.25
    assert replace(found, slots=0, inflight=20).load == 0.0


WAYS = {("a", "b"): 0.08, ("a", "c"): 0.15, ("b", "c"): 0.07}


def seen(targets: dict[tuple[str, str], float], *serving: str, home: str = "b", here: str = "a") -> dict[str, Endpoint]:
    target = Target(Kind.TOOL, "x", home_region=home)
    found = endpoints(target, ["a", "b", "c"], [worker(one) for one in serving or ("a", "b", "c")], RoundTrips(WAYS, targets), here)
    return {endpoint.region: endpoint for endpoint in found}


def api(**seconds: float) -> dict[tuple[str, str], float]:
    return {(where, "tool.x"): one for where, one in seconds.items()}


def test_the_whole_way_is_compared_once_it_is_measured_wherever_the_target_is_served() -> None:
    """The API is in c: 150 ms from a, wherever the step is executed on the way; but 250 ms from a's own workers, which dial badly."""
    found = seen(api(a=0.25, b=0.07, c=0.002))
    assert [found[one].round_trip_s for one in "abc"] == pytest.approx([0.25, 0.15, 0.152])
    assert [found[one].extra_s for one in "abc"] == pytest.approx([0.1, 0.0, 0.002])
    assert [found[one].nearest for one in "abc"] == [False, True, False]


def test_a_home_that_has_not_measured_stays_the_best() -> None:
    for partly in (api(a=0.001, c=0.002), {}, {("b", "tool.y"): 0.1}):
        found = seen(partly)
        assert [found[one].round_trip_s for one in "abc"] == [0.0, 0.08, 0.15]
        assert [(found[one].extra_s, found[one].nearest) for one in "abc"] == [(None, False), (None, True), (None, False)]
    elsewhere = seen(api(a=0.25, b=0.07, c=0.002), here="d")
    assert [one.extra_s for one in elsewhere.values()] == [None, None, None], "the way to any of them is not known"


def test_another_region_that_has_not_measured_is_not_the_best_and_taken_to_be_as_far_as_the_farthest() -> None:
    found = seen(api(b=0.07, c=0.002))
    assert [found[one].round_trip_s for one in "abc"] == pytest.approx([0.07, 0.15, 0.152])
    assert [found[one].nearest for one in "abc"] == [False, True, False]
    assert 0.0 < (found["a"].extra_s or 0.0) < 1e-5
    without_home = seen(api(c=0.002), "a", "c")
    assert [one for one, endpoint in without_home.items() if endpoint.nearest] == ["c"]
    assert seen({}, "a", "c")["a"].extra_s is None


@pytest.mark.parametrize(("at_a", "best"), [(0.0745, "b"), (0.0725, "a"), (0.09, "b")])
def test_the_home_is_left_for_what_is_not_noise(at_a: float, best: str) -> None:
    """Through the home b it is 82 ms, and 8.2 ms are a tenth of that."""
    assert [one for one, endpoint in seen(api(a=at_a, b=0.002, c=1.0)).items() if endpoint.nearest] == [best]


@pytest.mark.parametrize(("at_a", "best"), [(0.0015, "b"), (0.0005, "b"), (0.0004, "a")])
def test_a_millisecond_is_noise(at_a: float, best: str) -> None:
    found = seen(api(a=at_a, b=0.0015), "a", "b", here="b")
    assert found["b"].nearest
    ways = RoundTrips({("a", "b"): 0.0}, api(a=at_a, b=0.0015))
    pair = endpoints(Target(Kind.TOOL, "x", home_region="b"), ["a", "b"], [worker("a"), worker("b")], ways, "b")
    assert [endpoint.region for endpoint in pair if endpoint.nearest] == [best]


def test_a_target_stays_in_its_regions() -> None:
    target = Target(Kind.TOOL, "x", home_region="b", regions=("b", "c"))
    found = endpoints(target, ["a", "b", "c"], [worker("a"), worker("b")], RoundTrips(), "a")
    assert [(endpoint.region, endpoint.workers) for endpoint in found] == [("b", 1), ("c", 0)]


def test_what_is_configured_fills_what_nobody_measured_in_either_direction() -> None:
    measured = RoundTrips({("b", "a"): 0.09}, api(a=0.1))
    known = known_round_trips(measured, {("a", "b"): 0.08, ("b", "c"): 0.07})
    assert (known.between("a", "b"), known.between("c", "b"), known.between("a", "c")) == (0.09, 0.07, None)
    assert known.to_target("a", "tool.x") == 0.1
    assert known_round_trips(measured, {("a", "b"): 0.08}) is measured


# ---- the choice ----------------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Scores by region; an Exception is raised."""

    by_region: dict[str, float | Exception | None]
    weight: float = 1.0
    heard: list[str] = field(default_factory=list)

    def score(self, flow: Flow, endpoint: Endpoint, now_s: float) -> float | None:
        score = self.by_region.get(endpoint.region, 0.0)
        if isinstance(score, Exception):
            raise score
        return score

    def chosen(self, flow: Flow, endpoint: Endpoint, now_s: float) -> None:
        self.heard.append(endpoint.region)


def test_the_weighted_sum_decides() -> None:
    first = Scores({"near": 1.0, "far": 0.5})
    assert region(first) == "near"
    assert region(first, Scores({"far": 0.2}, weight=2.0)) == "near"
    assert region(first, Scores({"far": 0.3}, weight=2.0)) == "far"


def test_none_excludes_whatever_others_say_and_ties_go_home() -> None:
    assert region(Scores({"near": 100.0}), Scores({"near": None})) == "home"
    assert region(Scores({"near": None, "home": None, "far": None})) == ""
    assert region() == "home"
    assert region(among=(FAR, NEAR)) == "far", "the order of the configuration, where none is home"
    assert region(among=()) == ""


@pytest.mark.parametrize("nonsense", [ValueError("x"), float("nan"), float("inf"), "high"])
def test_a_policy_that_fails_for_one_endpoint_does_not_count_for_any(nonsense: object) -> None:
    contain = containment()
    failing = Scores({"near": 5.0, "far": nonsense})  # type: ignore[dict-item]
    assert choose([named(Scores({"far": 0.1})), named(failing, "bad")], ALL, FLOW, 0.0, contain) is FAR
    assert contain.counts == {("bad", "faults"): 1}
    assert failing.heard == ["far"]


def test_a_weight_that_is_no_number_is_the_policys_fault() -> None:
    contain = containment()
    assert choose([named(Scores({"near": 5.0}, weight="much"), "bad")], ALL, FLOW, 0.0, contain) is HOME  # type: ignore[arg-type]
    assert contain.counts["bad", "faults"] == len(ALL)


def test_a_shadow_has_no_effect_is_counted_when_it_would_change_the_choice_and_learns_what_happened() -> None:
    contain = containment()
    real, agrees, differs = Scores({"near": 1.0}), Scores({"far": 0.5}), Scores({"far": 2.0})
    policies = [named(agrees, "agrees", shadow=True), named(real, "real"), named(differs, "differs", shadow=True)]
    assert choose(policies, ALL, FLOW, 0.0, contain) is NEAR
    assert contain.counts == {("differs", "shadow_rejected"): 1}
    assert [scores.heard for scores in (real, agrees, differs)] == [["near"]] * 3


def test_a_shadow_that_would_exclude_everything_is_counted_and_excludes_nothing() -> None:
    contain = containment()
    nowhere = Scores({"near": None, "home": None, "far": None})
    assert choose([named(nowhere, "nowhere", shadow=True)], ALL, FLOW, 0.0, contain) is HOME
    assert contain.counts == {("nowhere", "shadow_rejected"): 1}


# ---- nearest_region ------------------------------------------------------------------------------------------------------------


def nearest(**config: float) -> NearestRegion:
    return NearestRegion(NearestRegionConfig(**config))


def test_nearest_prefers_home_then_near_and_leaves_dead_regions_out() -> None:
    dead_home = replace(HOME, workers=0)
    assert region(nearest()) == "home"
    assert region(nearest(), among=(replace(HOME, round_trip_s=0.9), NEAR)) == "home"
    assert region(nearest(), among=(FAR, dead_home, NEAR)) == "near"
    assert region(nearest(), among=(dead_home,)) == ""


def test_nearest_spills_over_the_bound_to_the_next_region_that_is_near_enough_and_within_it() -> None:
    policy = nearest(spill_at=1.25, max_spill_ms=100)
    assert region(policy, among=having(10, "home")) == "home"
    assert region(policy, among=having(11, "home")) == "near"
    assert region(policy, among=having(11, "home", among=(FAR, HOME))) == "home", "300 ms are too far"
    assert region(policy, among=having(11, "home", "near")) == "home", "nowhere is room"
    assert region(nearest(spill_at=0), among=having(99, "home")) == "home"


def test_nearest_takes_the_best_way_and_spills_to_what_is_not_much_farther_than_that() -> None:
    measured = tuple(replace(e, extra_s={"home": 0.05, "near": 0.0, "far": 0.09}[e.region]) for e in ALL)
    assert region(nearest(), among=measured) == "near", "though it is not the home"
    assert region(nearest(max_spill_ms=100), among=having(11, "near", among=measured)) == "home"
    assert region(nearest(max_spill_ms=100), among=having(11, "near", "home", among=measured)) == "far"
    assert region(nearest(max_spill_ms=100), among=having(11, "near", "home", "far", among=measured)) == "near", "nowhere is room"
    assert region(nearest(max_spill_ms=40), among=having(11, "near", among=measured)) == "near", "50 ms are too far"


def test_the_share_that_spills_is_of_what_the_nearest_region_gets() -> None:
    policy = nearest(spill_at=0.5, max_share=0.25)
    told = (replace(HOME, extra_s=0.01), replace(NEAR, extra_s=0.0, running=8))
    assert [region(policy, among=told) for _ in range(400)].count("home") == 100


def test_without_its_home_a_target_spills_by_the_same_rule() -> None:
    policy = nearest(max_spill_ms=100)
    third = Endpoint("third", 1, 8, 0, 0.11, home=False)
    assert region(policy, among=(third, replace(NEAR, inflight=11))) == "third", "90 ms farther"
    assert region(policy, among=(FAR, replace(NEAR, inflight=11))) == "near", "280 ms farther"


def test_at_most_a_share_spills_while_home_is_there() -> None:
    policy = nearest(spill_at=0.5, max_share=0.3)
    told = (replace(HOME, running=8), NEAR)  # the heartbeat says it is full, again and again
    went = [region(policy, among=told) for _ in range(5000)]
    assert went.count("near") - 1500 in (0, 1)
    assert all(went[i : i + 20].count("near") <= 7 for i in range(4980)), "not in bursts"


class Site:
    """A region's workers: what runs, and what they told in the last heartbeat."""

    def __init__(self, slots: int) -> None:
        self.slots, self.told = slots, 0
        self.steps: deque[tuple[float, int]] = deque()  # when each ends, and whose gateway it is; all take as long

    def inflight(self, gateway: int) -> int:
        return sum(1 for _, whose in self.steps if whose == gateway)


def test_two_gateways_that_spill_keep_the_home_at_its_bound_and_do_not_swing() -> None:
    """100 ms steps, 1.6 times what the home can do, heartbeats every two seconds: after a second the home never empties."""
    home, near = Site(8), Site(8)
    gateways = [nearest(spill_at=0.75), nearest(spill_at=0.75)]
    loads = []
    for tick in range(1280 * 2):  # one step in 1/128 s: eight slots do 80 a second
        now_s = tick / 128
        for site in (home, near):
            while site.steps and site.steps[0][0] <= now_s:
                site.steps.popleft()
            if tick % 256 == 0:
                site.told = min(len(site.steps), site.slots)
        mine = tick % 2
        views = [
            Endpoint("home", 1, home.slots, home.told, 0.0, True, home.inflight(mine)),
            Endpoint("near", 1, near.slots, near.told, 0.02, False, near.inflight(mine)),
        ]
        chosen = choose([named(gateways[mine])], views, FLOW, now_s, containment())
        (home if chosen is views[0] else near).steps.append((now_s + 0.1, mine))
        if now_s > 1:
            loads.append(len(home.steps) / home.slots)
    assert min(loads) >= 0.5
    assert max(loads) <= 2 * 0.75 + 0.25, "each gateway knows its own"


# ---- least_loaded --------------------------------------------------------------------------------------------------------------


def test_least_loaded_compares_steps_for_each_slot_and_settles_ties_by_round_trip() -> None:
    policy = LeastLoaded(LeastLoadedConfig())
    assert region(policy) == "home"
    assert region(policy, among=having(1, "home")) == "near"
    big = replace(FAR, slots=80, running=8)
    assert region(LeastLoaded(LeastLoadedConfig()), among=(replace(HOME, running=4), replace(NEAR, running=4), big)) == "far"
    assert region(policy, among=(replace(HOME, workers=0), FAR)) == "far"


def test_a_little_less_load_is_no_reason_to_go_far() -> None:
    at_home, afar = replace(HOME, slots=100, running=57), replace(FAR, slots=100, running=52)
    assert region(LeastLoaded(LeastLoadedConfig(grain=0.1)), among=(afar, at_home)) == "home"
    assert region(LeastLoaded(LeastLoadedConfig(grain=0.01)), among=(afar, at_home)) == "far"


def test_what_was_sent_since_the_heartbeat_counts() -> None:
    """Home is told to be emptier; after as many steps as make up for it, the next goes elsewhere."""
    policy, sent = LeastLoaded(LeastLoadedConfig(grain=0.125)), Counter[str]()
    for _ in range(6):
        views = (replace(HOME, running=2, inflight=sent["home"]), replace(NEAR, running=6, inflight=sent["near"]))
        sent[region(policy, among=views)] += 1
    assert sent == {"home": 5, "near": 1}


# ---- session_affinity ----------------------------------------------------------------------------------------------------------


def affinity(**config: float) -> SessionAffinity:
    return SessionAffinity(SessionAffinityConfig(**config))  # type: ignore[arg-type]


def test_a_run_returns_to_where_its_last_step_went_while_the_pin_holds() -> None:
    pin, near = affinity(pin_s=1.0), nearest()
    assert region(near, pin, among=having(11, "home"), now_s=0.0) == "near", "the home is full"
    assert region(near, pin, now_s=0.9) == "near", "it is not any more, but the run is pinned"
    assert region(near, pin, now_s=1.8) == "near", "the pin was renewed"
    assert region(near, pin, now_s=2.8) == "home", "it ran out"


def test_a_pin_is_the_runs_the_tenants_and_the_targets_own() -> None:
    pin = affinity()
    pin.chosen(FLOW, NEAR, 0.0)
    assert pin.score(FLOW, NEAR, 0.5) == 1.0
    for other in (replace(FLOW, run="r2"), replace(FLOW, tenant="u"), replace(FLOW, target="y"), replace(FLOW, run="")):
        assert pin.score(other, NEAR, 0.5) == 0.0
    pin.chosen(replace(FLOW, run=""), NEAR, 0.5)
    assert pin.score(replace(FLOW, run=""), NEAR, 0.5) == 0.0


def test_a_pin_is_given_up_for_a_region_that_is_gone_or_loaded() -> None:
    for gone in (replace(NEAR, workers=0), replace(NEAR, inflight=13)):
        pin, near = affinity(max_load=1.5), nearest()
        pin.chosen(FLOW, NEAR, 0.0)
        assert region(near, pin, among=(HOME, replace(NEAR, inflight=12)), now_s=0.1) == "near"
        assert region(near, pin, among=(HOME, gone), now_s=0.2) == "home"
        assert region(near, pin, now_s=0.3) == "home", "and there it stays"


def test_pins_are_bounded() -> None:
    pin = affinity(max_pins=2)
    flows = [replace(FLOW, run=f"r{i}") for i in range(3)]
    for flow in flows:
        pin.chosen(flow, NEAR, 0.0)
    assert [pin.score(flow, NEAR, 0.1) for flow in flows] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (NearestRegionConfig, {"max_share": 1.5}),
        (NearestRegionConfig, {"spill_at": -1.0}),
        (LeastLoadedConfig, {"grain": 0.0}),
        (SessionAffinityConfig, {"pin_s": 0.0}),
    ],
)
def test_wrong_parameters_are_refused(config: type, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


def test_parameters_change_and_what_was_learnt_stays() -> None:
    pin = affinity()
    pin.chosen(FLOW, NEAR, 0.0)
    pin.reconfigure(SessionAffinityConfig(weight=7.0))
    assert (pin.weight, pin.score(FLOW, NEAR, 0.5)) == (7.0, 1.0)
    policy = nearest(spill_at=0.5, max_share=0.3)
    told = (replace(HOME, running=8), NEAR)
    assert region(policy, among=told) == "near"
    policy.reconfigure(NearestRegionConfig(spill_at=0.5, max_share=0.1))
    assert [region(policy, among=told) for _ in range(7)] == ["home"] * 7, "the spilled step is paid for first"
    assert region(policy, among=told) == "near"

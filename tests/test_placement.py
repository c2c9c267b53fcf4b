"""Where a run is placed: what waiting is expected, the way of a call, what excludes a region, and what people are told."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Config, parse
from gateway.core.placement import UNKNOWN_S, Network, client_driven_s, dead_time, place
from gateway.edge.catalogue import read_target, write_target
from gateway.errors import ConfigError
from gateway.program.bounds import scopes
from gateway.program.model import Agent, Block, Budget, Call, Choose, Expression, Loop, Map, Parallel, Program, Template, Tool
from gateway.run_types import Placement, RoundTrips
from gateway.testing import MemoryBus
from gateway.testing_clock import ManualClock
from gateway.types import Kind, Target
from tests.program_strategies import TARGETS, programs
from workers.catalogue import merge_target
from workers.served import ServedTargets

REGIONS = ("home", "iad", "sfo")
YES, NOTHING = Expression("true"), Template(None)


def call(name: str, kind: Kind = Kind.TOOL) -> Call:
    return Call(f"{kind}-{name}", kind, name, NOTHING)


def program(*steps: object, **more: object) -> Program:
    return Program("p", steps, **more)  # type: ignore[arg-type]


def chain(*names: str) -> Block:
    return tuple(call(name) for name in names)


# ---- the longest chain ---------------------------------------------------------------------------------------------------------

COSTS = {"tool.a": 1.0, "tool.b": 10.0, "infer.m": 100.0}


def waited(made: Program) -> tuple[float, Mapping[str, float]]:
    found = dead_time(made, COSTS.__getitem__)
    return found.seconds, found.calls


def test_calls_one_after_the_other_add_up() -> None:
    assert waited(program(*chain("a", "b", "a"))) == (12.0, {"tool.a": 2, "tool.b": 1})
    assert waited(program()) == (0.0, {})


def test_of_branches_the_longest_counts() -> None:
    both = {"left": chain("a", "a", "a"), "right": chain("b")}
    assert waited(program(Parallel("p", both), *chain("a"))) == (11.0, {"tool.b": 1, "tool.a": 1})
    assert waited(program(Choose("c", YES, chain("a"), chain("b", "b")))) == (20.0, {"tool.b": 2})
    assert waited(program(Choose("c", YES, chain("a")))) == (1.0, {"tool.a": 1})
    assert waited(program(Parallel("p", {}))) == (0.0, {})


@pytest.mark.parametrize(
    ("most", "at_once", "of_run", "rounds"), [(100, 16, 16, 1), (100, 3, 16, 4), (100, 16, 5, 2), (7, 2, 16, 4), (4, 1, 16, 4)]
)
def test_a_map_takes_rounds_of_at_most_ten_items(most: int, at_once: int, of_run: int, rounds: int) -> None:
    made = program(Map("m", YES, "x", chain("b"), at_once=at_once, most=most), at_once=of_run)
    assert waited(made) == (10.0 * rounds, {"tool.b": rounds})


@pytest.mark.parametrize(("maximum", "times"), [(10, 5), (5, 2.5), (1, 1)])
def test_a_loop_is_half_of_its_maximum(maximum: int, times: float) -> None:
    assert waited(program(Loop("l", YES, maximum, chain("a", "b")))) == (11.0 * times, {"tool.a": times, "tool.b": times})


def test_an_agent_calls_its_model_and_one_of_its_tools_in_half_of_its_iterations() -> None:
    tools = {"one": Tool(Kind.TOOL, "a"), "two": Tool(Kind.TOOL, "b")}
    made = program(Agent("g", "m", NOTHING, tools, Budget(iterations=8)))
    assert waited(made) == (4 * 105.5, {"infer.m": 4, "tool.a": 2, "tool.b": 2})
    assert waited(program(Agent("g", "m", NOTHING, {}, Budget(iterations=8)))) == (400.0, {"infer.m": 4})


def test_what_is_nested_is_multiplied() -> None:
    made = program(Loop("l", YES, 4, (Map("m", YES, "x", (Parallel("p", {"l": chain("a"), "r": chain("b")}),), at_once=5),)))
    assert waited(made) == (10.0 * 2 * 2, {"tool.b": 4})


# ---- a world of three regions --------------------------------------------------------------------------------------------------

WAYS = {("home", "iad"): 0.08, ("home", "sfo"): 0.15, ("iad", "sfo"): 0.06}
FETCH = Target(Kind.TOOL, "fetch", home_region="home")
TEN = program(*chain(*["fetch"] * 10))


def network(
    targets: dict[tuple[str, str], float] | None = None,
    serving: dict[str, tuple[str, ...]] | None = None,
    known: tuple[Target, ...] = (FETCH,),
    ways: dict[tuple[str, str], float] = WAYS,
) -> Network:
    return Network(RoundTrips(ways, targets or {}), {one.scope: one for one in known}, serving or {one.scope: REGIONS for one in known})


def placed(made: Program, net: Network, **more: object) -> Placement:
    options: dict[str, object] = {"regions": REGIONS, "runners": REGIONS, "origin": "home"}
    return place(made, net, **(options | more))  # type: ignore[arg-type]


def dead_ms(placement: Placement) -> dict[str, float]:
    return {one.region: round(one.dead_s * 1000, 3) for one in placement.estimates}


def test_ten_dependent_calls_go_to_where_the_api_is() -> None:
    """The API is 2 ms from iad's workers and 82 from the others' way there; the client is in home, 80 ms from iad."""
    net = network({("home", "tool.fetch"): 0.082, ("iad", "tool.fetch"): 0.002, ("sfo", "tool.fetch"): 0.062})
    found = placed(TEN, net)
    assert found.region == "iad"
    assert dead_ms(found) == {"iad": 80 + 10 * 2, "sfo": 150 + 10 * 62, "home": 10 * 82}
    assert [one.region for one in found.estimates] == ["iad", "sfo", "home"]
    assert found.estimates[0].why == ("the client in home is 80.0 ms away", "10 calls of tool.fetch, 2.0 ms each through iad")
    assert found.estimates[2].why == ("10 calls of tool.fetch, 82.0 ms each through home", "the client in home is 0.0 ms away")
    assert client_driven_s(TEN, net, origin="home") == pytest.approx(0.82)


def test_one_call_is_not_worth_the_way() -> None:
    net = network({("home", "tool.fetch"): 0.082, ("iad", "tool.fetch"): 0.002})
    assert dead_ms(placed(program(call("fetch")), net)) == {"home": 82, "iad": 82, "sfo": 150 + 62}
    assert placed(program(call("fetch")), net).region == "home", "equal, so the client's"
    assert placed(program(call("fetch"), call("fetch")), net).region == "iad"


def test_a_call_goes_through_the_workers_that_make_it_shortest() -> None:
    net = network({("home", "tool.fetch"): 0.2, ("iad", "tool.fetch"): 0.01, ("sfo", "tool.fetch"): 0.01})
    assert net.call("home", "tool.fetch").via == "iad"
    assert net.call("home", "tool.fetch").seconds == pytest.approx(0.09)
    assert net.call("sfo", "tool.fetch").via == "sfo"
    only_sfo = replace(net, serving={"tool.fetch": ("sfo",)})
    assert only_sfo.call("home", "tool.fetch").seconds == pytest.approx(0.16)


def test_what_nobody_measured_is_at_its_home() -> None:
    far = replace(FETCH, home_region="sfo")
    net = network(known=(far,))
    assert dead_ms(placed(TEN, net)) == {"sfo": 150, "iad": 80 + 600, "home": 1500}
    assert net.call("home", "tool.fetch").via == "sfo", "through iad it would be 140 ms, and nobody knows"
    assert replace(net, serving={"tool.fetch": ("iad",)}).call("home", "tool.fetch").seconds == pytest.approx(0.14)


def test_the_result_comes_back_through_the_origin() -> None:
    """The client of a gateway in iad is in home: near home means twice over the ocean."""
    net = network({("home", "tool.fetch"): 0.0, ("iad", "tool.fetch"): 0.001, ("sfo", "tool.fetch"): 1.0})
    found = placed(program(call("fetch")), net, origin="iad", client_region="home")
    assert dead_ms(found) == {"iad": 81, "home": 160, "sfo": 140 + 61}
    assert "the client in home is 160.0 ms away through iad" in next(one for one in found.estimates if one.region == "home").why
    assert client_driven_s(TEN, net, origin="iad", client_region="home") == pytest.approx(0.81)
    nobody = placed(program(call("fetch")), net, origin="iad", client_region="mars")
    assert dead_ms(nobody) == {"iad": 1, "home": 80, "sfo": 60 + 61}, "somewhere: as if it were at the origin"


def test_an_unknown_way_is_taken_to_be_long_and_said_to_be_a_guess() -> None:
    net = network(ways={("home", "iad"): 0.08})
    assert net.between("sfo", "home").seconds == UNKNOWN_S
    found = {one.region: one for one in placed(program(call("fetch")), net).estimates}
    assert found["sfo"].dead_s == pytest.approx(2 * UNKNOWN_S)
    assert "the round trip between sfo and home is not known: 100.0 ms assumed" in found["sfo"].why
    assert not any("not known" in text for text in found["home"].why + found["iad"].why)


def test_why_begins_with_what_costs_most() -> None:
    plan = Target(Kind.INFER, "plan", home_region="sfo")
    made = program(*chain("fetch", "fetch", "fetch"), call("plan", Kind.INFER))
    found = placed(made, network({(one, "tool.fetch"): 0.01 for one in REGIONS}, known=(FETCH, plan)))
    home = next(one for one in found.estimates if one.region == "home")
    assert home.why == (
        "1 call of infer.plan, 150.0 ms each through sfo",
        "3 calls of tool.fetch, 10.0 ms each through home",
        "the client in home is 0.0 ms away",
    )


# ---- what excludes a region ----------------------------------------------------------------------------------------------------

NEAR_IAD = {("home", "tool.fetch"): 0.082, ("iad", "tool.fetch"): 0.002, ("sfo", "tool.fetch"): 0.062}


def excluded(placement: Placement) -> dict[str, str]:
    return {one.region: one.excluded for one in placement.estimates if one.excluded}


def test_a_run_stays_where_program_and_order_allow_it() -> None:
    found = placed(replace(TEN, regions=("home", "sfo")), network(NEAR_IAD))
    assert (found.region, excluded(found)) == ("sfo", {"iad": "only home, sfo allowed"})
    found = placed(replace(TEN, regions=("home", "sfo")), network(NEAR_IAD), allowed=[("home", "iad"), ()])
    assert found.region == "home"
    assert [one.region for one in found.estimates] == ["home", "iad", "sfo"], "the excluded ones last, the best of them first"
    assert placed(replace(TEN, regions=("sfo",)), network(NEAR_IAD), allowed=[("iad",)]).region == ""


def test_a_target_keeps_its_runs_and_its_steps_in_its_regions() -> None:
    kept = replace(FETCH, regions=("home", "sfo"))
    net = network(NEAR_IAD, known=(kept,))
    found = placed(TEN, net)
    assert excluded(found) == {"iad": "tool.fetch must not be called outside of home, sfo"}
    assert dead_ms(found) == {"sfo": 150 + 620, "home": 820, "iad": 80 + 10 * (60 + 62)}
    assert net.call("iad", "tool.fetch").via == "sfo", "not through iad's own workers"


def test_a_region_without_a_runner_is_not_chosen() -> None:
    found = placed(TEN, network(NEAR_IAD), runners=("home", "sfo"))
    assert (found.region, excluded(found)) == ("sfo", {"iad": "no runner there"})
    nowhere = placed(replace(TEN, regions=("home",)), network(NEAR_IAD), runners=())
    assert nowhere.region == ""
    assert excluded(nowhere)["iad"] == "only home allowed; no runner there"


def test_a_target_that_nobody_serves_excludes_nothing() -> None:
    net = replace(network(), serving={"tool.fetch": ()})
    found = placed(TEN, net)
    assert (found.region, excluded(found)) == ("home", {})
    assert all("nobody serves tool.fetch now: the run waits for it" in one.why for one in found.estimates)
    elsewhere = network(known=(replace(FETCH, regions=("home",)),), serving={"tool.fetch": ("iad",)})
    assert "nobody serves tool.fetch now: the run waits for it" in placed(TEN, elsewhere).estimates[0].why


# ---- where a target's regions come from ----------------------------------------------------------------------------------------


def configured(**target: object) -> Config:
    return parse({"regions": [{"name": one} for one in REGIONS], "targets": [{"kind": "tool", "name": "fetch", **target}]})


def test_the_regions_of_a_target_travel_with_it() -> None:
    (section,) = configured(regions=["iad", "sfo"], home_region="sfo").targets
    for target in (section.target(), merge_target(section, FETCH)):
        assert (target.regions, target.home_region) == (("iad", "sfo"), "sfo")
        assert read_target(write_target(target)) == target
    older = json.loads(write_target(FETCH))
    del older["regions"]
    assert read_target(json.dumps(older).encode()).regions == ()


def test_the_home_of_a_target_is_one_of_its_regions() -> None:
    (section,) = configured(regions=["home", "iad"]).targets
    assert merge_target(section, replace(FETCH, home_region="sfo")).home_region == "home", "not what was announced"
    with pytest.raises(ConfigError, match="its home_region 'home' is not among them"):
        configured(regions=["iad"])
    with pytest.raises(ConfigError, match=r"targets\.0\.regions: there is no region 'iat' in \[\[regions\]\]; did you mean 'iad'"):
        configured(regions=["home", "iat"])


@pytest.mark.parametrize(("region", "announced"), [("iad", ("fetch", "other")), ("sfo", ("other",))])
async def test_a_worker_outside_of_its_regions_does_not_serve_a_target(region: str, announced: tuple[str, ...]) -> None:
    class Offers:
        def targets(self) -> Sequence[Target]:
            return [FETCH, Target(Kind.TOOL, "other")]

    config, clock = configured(regions=["home", "iad"]), ManualClock()
    bus: Any = MemoryBus(config, clock).worker("w", region)
    offers: Any = Offers()
    unused: Any = None
    served = ServedTargets(config, region, bus, offers, clock, lambda: 0.5, unused, unused, unused)
    await served.announce_changes()
    assert tuple(target.name for target in served.announced) == announced
    assert tuple(sorted(served.lanes)) == announced


# ---- whatever the program and the network --------------------------------------------------------------------------------------

some_regions = st.sets(st.sampled_from(REGIONS)).map(lambda found: tuple(sorted(found)))
seconds = st.floats(0, 1)
links = st.dictionaries(st.sampled_from([(a, b) for a in REGIONS for b in REGIONS if a != b]), seconds)
apis = st.dictionaries(st.tuples(st.sampled_from(REGIONS), st.sampled_from(sorted(TARGETS))), seconds)


@st.composite
def worlds(draw: st.DrawFn, residency: bool = True) -> tuple[Program, Network]:
    made = draw(programs())
    known = {
        scope: replace(TARGETS[scope], home_region=draw(st.sampled_from(REGIONS)), regions=draw(some_regions) if residency else ())
        for scope in sorted(scopes(made))
    }
    serving = {scope: draw(some_regions) for scope in known}
    made = replace(made, regions=draw(some_regions) if residency else ())
    return made, Network(RoundTrips(draw(links), draw(apis)), known, serving)


def test_a_home_that_has_not_measured_gets_its_steps() -> None:
    net = network({("iad", "tool.fetch"): 0.002}, known=(replace(FETCH, home_region="sfo"),))
    assert net.call("iad", "tool.fetch").via == "sfo"
    assert replace(net, serving={"tool.fetch": ("home", "iad")}).call("home", "tool.fetch").via == "iad"


@given(worlds(), some_regions, some_regions, st.sampled_from(REGIONS), st.sampled_from(["", *REGIONS]))
def test_the_least_dead_time_among_what_is_allowed(
    world: tuple[Program, Network], runners: tuple[str, ...], allowed: tuple[str, ...], origin: str, client: str
) -> None:
    made, net = world
    found = place(made, net, regions=REGIONS, runners=runners, origin=origin, client_region=client, allowed=[allowed])
    fits = [
        one
        for one in REGIONS
        if one in runners
        and one in (made.regions or REGIONS)
        and one in (allowed or REGIONS)
        and all(one in (target.regions or REGIONS) for target in net.targets.values())
    ]
    assert sorted(one.region for one in found.estimates) == sorted(REGIONS)
    assert sorted(one.region for one in found.estimates if not one.excluded) == sorted(fits)
    if not fits:
        assert found.region == ""
        return
    assert found.region in fits
    dead = {one.region: one.dead_s for one in found.estimates}
    assert dead[found.region] == min(dead[one] for one in fits)


@given(worlds(), st.sampled_from(REGIONS), st.floats(0, 1), st.sampled_from(REGIONS))
def test_more_distance_makes_no_region_better(world: tuple[Program, Network], region: str, more_s: float, origin: str) -> None:
    """The links and the APIs of one region become longer by the same; what was not measured before is not measured after either."""
    made, net = world
    trips = net.round_trips
    farther = RoundTrips(
        {pair: one + (more_s if region in pair else 0) for pair, one in trips.regions.items()},
        {key: one + (more_s if key[0] == region else 0) for key, one in trips.targets.items()},
    )
    before = placed(made, net, origin=origin)
    after = placed(made, replace(net, round_trips=farther), origin=origin)
    was = {one.region: one.dead_s for one in before.estimates}
    assert all(one.dead_s >= was[one.region] - 1e-6 for one in after.estimates)


@given(worlds(residency=False), st.sampled_from(REGIONS), st.sampled_from(["", *REGIONS]))
def test_where_nothing_is_far_the_run_is_with_its_client(world: tuple[Program, Network], origin: str, client: str) -> None:
    made, net = world
    near = RoundTrips({(a, b): 0.0 for a in REGIONS for b in REGIONS}, dict.fromkeys(net.round_trips.targets, 0.0))
    assert placed(made, replace(net, round_trips=near), origin=origin, client_region=client).region == (client or origin)


@given(worlds(residency=False), st.sampled_from(REGIONS))
def test_running_it_at_the_origin_costs_what_driving_it_from_there_does(world: tuple[Program, Network], origin: str) -> None:
    made, net = world
    dead = {one.region: one.dead_s for one in placed(made, net, origin=origin).estimates}
    assert client_driven_s(made, net, origin=origin) == pytest.approx(dead[origin], abs=1e-6)

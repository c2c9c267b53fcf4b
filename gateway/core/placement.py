"""Which region gets a run: the one in which it wastes the least time in waiting for the network.

    dead time in r = way to the client and back + the longest chain of calls, each from r to its target and back

A call from r goes to the workers of a region s, and from there to what the target calls, so it costs

    the least, over the regions s whose workers serve the target, of    r <-> s    +    s <-> what it calls

where the second part was measured by the workers of s. A target that nobody measured is taken to be at its home, and that is where its
steps are executed (as in routing, which leaves it only for what was measured). Calls one after the other add up; of calls at the same
time the longest chain counts. How often something happens is not known before it does:

    while    half of its maximum            map     10 items, or its most, in rounds of as many as may run at once
    choose   the longer branch              agent   half of its iterations, each a call of the model and one of a tool (their mean)

What a call takes to execute is the same from everywhere and left out, as are retries. A result comes back through the region that
accepted the run, its origin, and the client is as far from that as it is. A round trip that nobody measured or configured is taken to
be UNKNOWN_S, so that a region about which nothing is known is chosen only when nothing better is.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.program.model import Agent, Block, Call, Choose, Loop, Map, Node, Parallel, Program
from gateway.run_types import Placement, RegionEstimate, RoundTrips
from gateway.types import Kind, Target

UNKNOWN_S = 0.1  # between two continents
EXPECTED_ITEMS = 10


@dataclass(frozen=True, slots=True)
class Chain:
    """Calls that wait for each other: the seconds in which nothing else happens, and how often each scope is called among them."""

    seconds: float = 0.0
    calls: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: "Chain") -> "Chain":
        counts = dict(self.calls)
        for scope, count in other.calls.items():
            counts[scope] = counts.get(scope, 0.0) + count
        return Chain(self.seconds + other.seconds, counts)

    def times(self, count: float) -> "Chain":
        return Chain(self.seconds * count, {scope: calls * count for scope, calls in self.calls.items()})


CallCost = Callable[[str], float]  # of a scope, seconds


def dead_time(program: Program, call_s: CallCost) -> Chain:
    """The longest chain of a run's calls that is to be expected."""
    return _block(program.steps, call_s, program.at_once)


def _block(block: Block, call_s: CallCost, at_once: int) -> Chain:
    return sum((_node(node, call_s, at_once) for node in block), Chain())


def _node(node: Node, call_s: CallCost, at_once: int) -> Chain:
    if isinstance(node, Call):
        return _call(node.kind, node.target, call_s)
    if isinstance(node, Parallel):
        return _longest(tuple(node.branches.values()), call_s, at_once)
    if isinstance(node, Choose):
        return _longest((node.then, node.otherwise), call_s, at_once)
    if isinstance(node, Map):
        rounds = math.ceil(min(node.most, EXPECTED_ITEMS) / min(node.at_once, at_once))
        return _block(node.body, call_s, at_once).times(rounds)
    if isinstance(node, Loop):
        return _block(node.body, call_s, at_once).times(_half(node.maximum))
    return _agent(node, call_s)


def _agent(node: Agent, call_s: CallCost) -> Chain:
    once = _call(Kind.INFER, node.model, call_s)
    for tool in node.tools.values():
        once += _call(tool.kind, tool.target, call_s).times(1 / len(node.tools))
    return once.times(_half(node.budget.iterations))


def _call(kind: Kind, target: str, call_s: CallCost) -> Chain:
    scope = f"{kind.value}.{target}"
    return Chain(call_s(scope), {scope: 1.0})


def _longest(blocks: Sequence[Block], call_s: CallCost, at_once: int) -> Chain:
    return max((_block(block, call_s, at_once) for block in blocks), key=lambda chain: chain.seconds, default=Chain())


def _half(count: int) -> float:
    return max(1.0, count / 2)


# ---- the network ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """From a region to what a target calls and back. via: the region whose workers execute the step. unknown: pairs of regions on the
    way whose round trip is only assumed."""

    seconds: float
    via: str
    unknown: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Network:
    """What there is to call, and how far away it is. targets: by scope. serving: the regions with live workers, by scope."""

    round_trips: RoundTrips
    targets: Mapping[str, Target]
    serving: Mapping[str, Collection[str]]

    def between(self, one: str, other: str) -> Way:
        seconds = self.round_trips.between(one, other)
        return Way(UNKNOWN_S, other, frozenset({(one, other)})) if seconds is None else Way(seconds, other)

    def call(self, region: str, scope: str) -> Way:
        """As its step would be routed. For a target that nobody serves now: as if its home (or the regions that it allows) did."""
        target = self.targets.get(scope)
        home = target.home_region if target else region
        allowed = target.regions if target else ()
        live = [one for one in self.serving.get(scope, ()) if not allowed or one in allowed]
        measured = [one for one in live if self.round_trips.to_target(one, scope) is not None]
        if home in live and home not in measured:
            measured = [home]
        ways = [self._through(region, one, scope, home) for one in measured or live or allowed or (home,)]
        return min(ways, key=lambda way: (way.seconds, way.via != home, way.via))

    def is_served(self, scope: str) -> bool:
        target = self.targets.get(scope)
        return any(target is None or not target.regions or one in target.regions for one in self.serving.get(scope, ()))

    def _through(self, region: str, via: str, scope: str, home: str) -> Way:
        near, measured_s = self.between(region, via), self.round_trips.to_target(via, scope)
        far = self.between(via, home) if measured_s is None else Way(measured_s, via)
        return Way(near.seconds + far.seconds, via, near.unknown | far.unknown)

    def to_client(self, region: str, origin: str, client_region: str) -> Way:
        """From a run to its client: through the origin. A client whose region is not known is taken to be at the origin."""
        there = self.between(region, origin)
        last = self.between(origin, client_region or origin)
        return Way(there.seconds + last.seconds, origin, there.unknown | last.unknown)


# ---- the choice ----------------------------------------------------------------------------------------------------------------


def place(
    program: Program,
    network: Network,
    *,
    regions: Sequence[str],
    runners: Collection[str],
    origin: str,
    client_region: str = "",
    allowed: Sequence[Collection[str]] = (),
) -> Placement:
    """The region with the least dead time; among equals (to the microsecond) the client's, then the first in `regions`.

    regions: all of them, in the order of the configuration. runners: those with a live worker that executes programs. origin: of the
    gateway that accepts the run. allowed: sets of regions beside the program's own; an empty one allows all. network.targets has
    everything that the program may call: where one of them has `regions`, the run stays in them.
    """
    client = client_region if client_region in regions else origin
    estimates = [_estimate(program, network, region, runners, origin, client, (program.regions, *allowed)) for region in regions]
    order = {region: place for place, region in enumerate(regions)}
    estimates.sort(key=lambda one: (bool(one.excluded), one.dead_s, one.region != client, order[one.region]))
    best = estimates[0] if estimates and not estimates[0].excluded else None
    return Placement(best.region if best else "", tuple(estimates))


def client_driven_s(program: Program, network: Network, *, origin: str, client_region: str = "") -> float:
    """Dead time of the same calls when a client makes each of them itself, by `Execute` at the origin."""
    client_s = network.to_client(origin, origin, client_region).seconds
    return dead_time(program, lambda scope: client_s + network.call(origin, scope).seconds).seconds


def _estimate(
    program: Program,
    network: Network,
    region: str,
    runners: Collection[str],
    origin: str,
    client: str,
    allowed: Sequence[Collection[str]],
) -> RegionEstimate:
    chain = dead_time(program, lambda scope: network.call(region, scope).seconds)
    to_client = network.to_client(region, origin, client)
    reasons = [(to_client.seconds, _to_client(to_client.seconds, client, region, origin))]
    unknown = set(to_client.unknown)
    for scope, count in chain.calls.items():
        way = network.call(region, scope)
        unknown |= way.unknown
        reasons.append((way.seconds * count, f"{_calls(count)} of {scope}, {_ms(way.seconds)} each through {way.via}"))
    reasons.sort(key=lambda reason: (-reason[0], reason[1]))
    remarks = [f"the round trip between {one} and {other} is not known: {_ms(UNKNOWN_S)} assumed" for one, other in sorted(unknown)]
    remarks += [f"nobody serves {scope} now: the run waits for it" for scope in sorted(network.targets) if not network.is_served(scope)]
    why = (*(text for _, text in reasons), *remarks)
    return RegionEstimate(region, round(to_client.seconds + chain.seconds, 6), why, _excluded(network, region, runners, allowed))


def _excluded(network: Network, region: str, runners: Collection[str], allowed: Sequence[Collection[str]]) -> str:
    reasons = [f"only {_names(some)} allowed" for some in allowed if some and region not in some]
    for scope, target in sorted(network.targets.items()):
        if target.regions and region not in target.regions:
            reasons.append(f"{scope} must not be called outside of {_names(target.regions)}")
    if region not in runners:
        reasons.append("no runner there")
    return "; ".join(dict.fromkeys(reasons))


def _names(regions: Collection[str]) -> str:
    return ", ".join(sorted(regions))


def _calls(count: float) -> str:
    return "1 call" if count == 1 else f"{count:.3g} calls"


def _to_client(seconds: float, client: str, region: str, origin: str) -> str:
    through = f" through {origin}" if origin not in (client, region) else ""
    return f"the client in {client} is {_ms(seconds)} away{through}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"

"""Which region gets a step: candidates from the live workers, the weighted sum of the policies' scores, the highest wins."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.core.containment import Check, Containment, a_number_or_none
from gateway.policy import Named
from gateway.run_types import RoundTrips
from gateway.types import Endpoint, Flow, Target, WorkerInfo

Totals = list[float | None]  # one for each candidate; None for one that a policy excluded
LITTLE_S, LITTLE = 0.001, 0.1  # a region that is nearer than the home by no more than that is no reason to leave it: it may be noise
_NOT_BEST_S = 1e-6  # extra time of one that is not chosen although it is as near


def known_round_trips(measured: RoundTrips, configured_s: Mapping[tuple[str, str], float]) -> RoundTrips:
    """What was measured, and what is configured (seconds, by two regions) where nothing was."""
    added = {pair: seconds for pair, seconds in configured_s.items() if measured.between(*pair) is None}
    return replace(measured, regions={**added, **measured.regions}) if added else measured


def endpoints(
    target: Target, regions: Sequence[str], workers: Iterable[WorkerInfo], round_trips: RoundTrips, here: str
) -> tuple[Endpoint, ...]:
    """One endpoint for each region that the target allows, with the workers there that serve it and do not drain.

    A worker tells slots and running steps of all its targets together; the target's part of both is taken to be that of its slots.
    round_trip_s is the way from `here` to the region, 0 where that is not known. Once it is known, and measured how far it is from there
    to what the target calls, it is the whole way, and `extra_s` tells which region is best: never one about which that is not known. A
    home with workers about which it is not known remains the best, since a part of its way cannot be compared with the whole of others.
    """
    serving = [worker for worker in workers if target.scope in worker.targets and not worker.draining]
    found = []
    for region in regions:
        if target.regions and region not in target.regions:
            continue
        in_it = [(worker, min(1.0, target.slots / max(worker.slots, 1))) for worker in serving if worker.region == region]
        found.append(
            Endpoint(
                region=region,
                workers=len(in_it),
                slots=sum(round(worker.slots * part) for worker, part in in_it),
                running=sum(round(worker.running * part) for worker, part in in_it),
                round_trip_s=round_trips.between(here, region) or 0.0,
                home=region == target.home_region,
            )
        )
    return _compared(found, target, round_trips, here)


def _compared(found: Sequence[Endpoint], target: Target, round_trips: RoundTrips, here: str) -> tuple[Endpoint, ...]:
    far = {
        one.region: round_trips.to_target(one.region, target.scope) for one in found if round_trips.between(here, one.region) is not None
    }
    whole = {one.region: one.round_trip_s + far_s for one in found if (far_s := far.get(one.region)) is not None}
    live = [one for one in found if one.workers]
    best = min((one for one in live if one.region in whole), key=lambda one: whole[one.region], default=None)
    home = next((one for one in live if one.home), None)
    if best is None or (home is not None and home.region not in whole):
        return tuple(found)
    if home is not None and whole[home.region] - whole[best.region] <= max(LITTLE_S, LITTLE * whole[home.region]):
        best = home
    least_s, worst_s = whole[best.region], max(far_s for far_s in far.values() if far_s is not None)
    compared = [replace(one, round_trip_s=whole.get(one.region, one.round_trip_s + worst_s)) for one in found]
    return tuple(
        replace(one, extra_s=0.0 if one.region == best.region else max(one.round_trip_s - least_s, _NOT_BEST_S)) for one in compared
    )


def choose(policies: Sequence[Named], candidates: Sequence[Endpoint], flow: Flow, now_s: float, contain: Containment) -> Endpoint | None:
    """The endpoint with the highest score; None when every candidate was excluded. Ties go to the target's home, then to config order.

    A shadow is counted when the choice would have been another one with its score among the others. Every policy hears where the step
    really goes, shadows too, so that they learn from the same steps as if they counted.
    """
    totals: Totals = [0.0] * len(candidates)
    for named in policies:
        if not named.shadow:
            totals = _plus(totals, named, candidates, flow, now_s, contain)
    chosen = _best(candidates, totals)
    for named in policies:
        if named.shadow and _best(candidates, _plus(totals, named, candidates, flow, now_s, contain)) is not chosen:
            contain.count(named, "shadow_rejected")
    if chosen is not None:
        for named in policies:
            contain.call(named, "chosen", None, None, flow, chosen, now_s)
    return chosen


_FAILED = object()


def _plus(totals: Totals, named: Named, candidates: Sequence[Endpoint], flow: Flow, now_s: float, contain: Containment) -> Totals:
    """The totals with a policy's scores; without any of them when it fails for one, or failing would make an endpoint better or worse."""
    check = _weighted(named.policy)
    scores = [contain.call(named, "score", check, _FAILED, flow, endpoint, now_s) for endpoint in candidates]
    if any(score is _FAILED for score in scores):
        return totals
    return [None if total is None or score is None else total + score for total, score in zip(totals, scores, strict=True)]


def _weighted(policy: Any) -> Check:
    def check(answer: Any) -> float | None:
        score: float | None = a_number_or_none(answer)
        if score is None:
            return None
        score *= policy.weight
        if not math.isfinite(score):
            raise ValueError(f"its score {answer!r} times its weight {policy.weight!r} is not finite")
        return score

    return check


def _best(candidates: Sequence[Endpoint], totals: Totals) -> Endpoint | None:
    best: tuple[float, bool] | None = None
    chosen = None
    for endpoint, total in zip(candidates, totals, strict=True):
        if total is not None and (best is None or (total, endpoint.home) > best):
            best, chosen = (total, endpoint.home), endpoint
    return chosen

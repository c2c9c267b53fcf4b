"""Which region gets a step: candidates from the live workers, the weighted sum of the policies' scores, the highest wins."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gateway.core.containment import Check, Containment, a_number_or_none
from gateway.policy import Named
from gateway.types import Endpoint, Flow, Target, WorkerInfo

Totals = list[float | None]  # one for each candidate; None for one that a policy excluded


def endpoints(
    target: Target, regions: Sequence[str], workers: Iterable[WorkerInfo], round_trip_s: Callable[[str], float]
) -> tuple[Endpoint, ...]:
    """One endpoint for each region, with the workers there that serve the target and do not drain.

    A worker tells slots and running steps of all its targets together; the target's part of both is taken to be that of its slots.
    """
    serving = [worker for worker in workers if target.scope in worker.targets and not worker.draining]
    found = []
    for region in regions:
        here = [(worker, min(1.0, target.slots / max(worker.slots, 1))) for worker in serving if worker.region == region]
        found.append(
            Endpoint(
                region=region,
                workers=len(here),
                slots=sum(round(worker.slots * part) for worker, part in here),
                running=sum(round(worker.running * part) for worker, part in here),
                round_trip_s=round_trip_s(region),
                home=region == target.home_region,
            )
        )
    return tuple(found)


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

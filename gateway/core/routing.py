"""Which region gets a step: candidates from the live workers, the weighted sum of the policies' scores, the highest wins."""

from collections.abc import Callable, Iterable, Sequence

from gateway.core.faults import Faults
from gateway.policy import Named
from gateway.types import Endpoint, Flow, Target, WorkerInfo


def endpoints(
    target: Target, regions: Sequence[str], workers: Iterable[WorkerInfo], round_trip_s: Callable[[str], float]
) -> tuple[Endpoint, ...]:
    """One endpoint for each region, with the workers there that serve the target and do not drain."""
    serving = [worker for worker in workers if target.scope in worker.targets and not worker.draining]
    found = []
    for region in regions:
        here = [worker for worker in serving if worker.region == region]
        found.append(
            Endpoint(
                region=region,
                workers=len(here),
                slots=sum(worker.slots for worker in here),
                running=sum(worker.running for worker in here),
                round_trip_s=round_trip_s(region),
                home=region == target.home_region,
            )
        )
    return tuple(found)


def choose(policies: Sequence[Named], candidates: Sequence[Endpoint], flow: Flow, now_s: float, faults: Faults) -> str | None:
    """The region with the highest score; None when every candidate was excluded. Ties go to the target's home, then to config order."""
    best: tuple[float, bool] | None = None
    chosen = None
    for endpoint in candidates:
        total: float | None = 0.0
        for named in policies:
            try:
                score = named.policy.score(flow, endpoint, now_s)
            except Exception as error:
                faults.note(named, error)
                continue
            if score is None:
                total = None
                break
            total = (total or 0.0) + named.policy.weight * score
        if total is not None and (best is None or (total, endpoint.home) > best):
            best, chosen = (total, endpoint.home), endpoint.region
    return chosen

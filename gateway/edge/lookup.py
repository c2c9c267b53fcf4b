"""Where is a step? `js` is that of the queue's region."""

import asyncio
from collections.abc import Sequence

from gateway import subjects
from gateway.edge import kept
from gateway.edge.jetstream import JetStream, until_answered
from gateway.edge.sites import Sites
from gateway.errors import Unavailable
from gateway.types import Step, StepResult

_LOCATE_S = 2.0  # for a region that does not answer
_SILENT_S = 5.0  # so long such a region is not waited for again: a run that is taken over looks for each of its steps


async def is_queued(js: JetStream, step: Step, region: str) -> bool:
    """Asks the leader for the number of messages on the step's subject, so the body does not travel. Raises Unavailable."""
    subject = subjects.step(region, step.kind, step.target, step.lane, step.id)
    body = {"subjects_filter": subject}
    answer = await until_answered("a look at a queue", lambda _: js.api(f"STREAM.INFO.{subjects.steps_stream(region)}", body))
    return subject in (answer["state"].get("subjects") or {})


async def withdraw(js: JetStream, step: Step, region: str) -> None:
    """Removes the step from its queue. Raises Unavailable."""
    subject = subjects.step(region, step.kind, step.target, step.lane, step.id)
    stream = subjects.steps_stream(region)
    await until_answered("a withdrawal", lambda _: js.api(f"STREAM.PURGE.{stream}", {"filter": subject}))


async def locate(sites: Sites, step: Step, regions: Sequence[str], certain: bool = False) -> tuple[StepResult | None, str]:
    """The result, if one of the regions has it, and the region in whose queue the step is. Raises Unavailable when none answers; when it
    must be certain, also when nothing was found and one does not answer."""
    now_s = asyncio.get_running_loop().time()
    heard = [region for region in dict.fromkeys(regions) if sites.silent_until_s.get(region, 0.0) <= now_s]
    wanted = dict.fromkeys(regions) if certain else heard or dict.fromkeys(regions)
    looks = [asyncio.create_task(_look(sites, step, region), name=f"locate in {region}") for region in wanted]
    silent, queued_in = 0, ""
    try:
        for look in asyncio.as_completed(looks):
            try:
                result, region = await look
            except (Unavailable, TimeoutError):
                silent += 1
                continue
            if result is not None:
                return result, region
            queued_in = queued_in or region
    finally:
        for task in looks:
            task.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
    if looks and (silent == len(looks) or (certain and silent and not queued_in)):
        raise Unavailable(f"{silent} of the regions {', '.join(wanted)} did not answer within {_LOCATE_S:g} s")
    return None, queued_in


async def _look(sites: Sites, step: Step, region: str) -> tuple[StepResult | None, str]:
    """First the queue, then the result: a step that ends meanwhile leaves its queue after its result is stored."""
    try:
        async with asyncio.timeout(_LOCATE_S):
            queued = await is_queued(sites.js_of(region), step, region)
            decides = subjects.result_region(step.id, region)
            result = await kept.read(sites.js_of(decides), step.tenant, step.id, decides)
    except TimeoutError:
        if region not in sites.own_regions:
            sites.silent_until_s[region] = asyncio.get_running_loop().time() + _SILENT_S
        raise
    return result, region if queued else ""

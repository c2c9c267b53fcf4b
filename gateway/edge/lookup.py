"""Is a step still in its queue?"""

from gateway import subjects
from gateway.edge.jetstream import JetStream, until_answered
from gateway.types import Step


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

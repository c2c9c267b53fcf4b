"""How often a step was handed back: one number for each step in a bucket, kept until the step's time is over. The bucket
is that of the queue's region, and `js` too."""

import asyncio
import math

from gateway import subjects
from gateway.edge import codec
from gateway.edge import headers as h
from gateway.edge.jetstream import ApiError, JetStream, NoAnswer, until_answered
from gateway.errors import Unavailable

_STREAM = f"KV_{subjects.HANDBACKS_BUCKET}"
_MARGIN_S = 60.0  # a step that waits for a delayed delivery at its deadline is still asked about
_TIMEOUT_S = 2.0  # the step is held meanwhile


async def read(js: JetStream, tenant: str, step_id: str) -> int:
    """Raises Unavailable."""
    return await until_answered("a count of hand-backs", lambda _: _read(js, subjects.hand_backs(tenant, step_id)))


async def add(js: JetStream, tenant: str, step_id: str, remaining_s: float) -> None:
    """One more. Two workers that hold the same step at once may write the same number: then a delivery too many counts as failed.

    Raises Unavailable after one try.
    """
    subject = subjects.hand_backs(tenant, step_id)
    headers = h.block(f"{codec.H_TTL}: {math.ceil(remaining_s + _MARGIN_S)}s\r\n")
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            count = await _read(js, subject) + 1
            await js.publish(subject, b"%d" % count, headers)
    except (NoAnswer, ApiError, TimeoutError) as error:
        raise Unavailable(f"a hand-back could not be noted: {type(error).__name__} {error}") from None


async def _read(js: JetStream, subject: str) -> int:
    found = await js.direct_last(_STREAM, subject)
    return int(found.data) if found is not None and found.data.isdigit() else 0

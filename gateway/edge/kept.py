"""Results in the results stream: written once by compare-and-set, read back."""

import math

from gateway import subjects
from gateway.edge import codec
from gateway.edge import headers as h
from gateway.edge.jetstream import WRONG_LAST_SEQUENCE, ApiError, JetStream, Message, until_answered
from gateway.errors import Unavailable
from gateway.types import StepResult


async def commit(js: JetStream, result: StepResult, keep_s: float, region: str) -> bool:
    """Stores the result if there is none; `js` is the region's. Repeats until the outcome is known.

    Raises InvalidStep (too large), Unavailable.
    """
    subject, call = subjects.result(region, result.tenant, result.step_id), js.new_call()
    fence = f"{codec.H_EXPECTED_SUBJECT_SEQUENCE}: 0\r\n{codec.H_TTL}: {max(1, math.ceil(keep_s))}s\r\n{codec.H_CALL}: {call}\r\n"
    headers = codec.result_headers(result, extra=fence)

    async def attempt(tries: int) -> bool:
        try:
            await js.publish(subject, result.output.data, headers)
        except ApiError as error:
            if error.err_code not in WRONG_LAST_SEQUENCE:
                raise Unavailable(f"NATS refused a result: {error}") from None
            if tries == 0:
                return False
            # The try before may have been stored although its answer was lost. Worker and attempt would not tell: a server that
            # crashed can count the same attempt again.
            stored = await js.last(subjects.RESULTS_STREAM, subject)
            return stored is not None and h.parse(stored.headers).get(codec.H_CALL) == call
        return True

    return await until_answered("a result", attempt)


async def read(js: JetStream, tenant: str, step_id: str, region: str) -> StepResult | None:
    """`js` is the region's. Raises Unavailable."""
    subject = subjects.result(region, tenant, step_id)
    found = await until_answered("a read", lambda _: js.direct_last(subjects.RESULTS_STREAM, subject))
    return None if found is None else _read(found)


def _read(message: Message) -> StepResult:
    return codec.read_result(message.subject, message.headers, message.data)

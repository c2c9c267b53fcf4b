"""What the RPCs share: reading a request, counting what is in flight, and turning what went wrong into an error of ours."""

import logging
import os
import traceback
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from gateway.errors import InvalidStep, NearloopError, Rejected

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
OVERLOADED_RETRY_S = 1.0


@dataclass(slots=True)
class Load:
    """Calls and steps of sessions that are in flight in this gateway, and how many may be."""

    limit: int
    count: int = 0

    def check(self) -> None:
        """Raises Rejected when there are too many, the one that asks included."""
        if self.count > self.limit:
            raise Rejected(
                f"{self.limit} calls are in flight, as many as this gateway takes (gateway.max_in_flight)",
                reason="TOO_MANY_IN_FLIGHT",
                scope="gateway",
                retry_after_s=OVERLOADED_RETRY_S,
            )


class Stalled(Exception):
    """The reader of a stream has taken nothing for after_s seconds."""

    def __init__(self, after_s: float) -> None:
        super().__init__()
        self.after_s = after_s


def parse(kind: type[M], raw: bytes) -> M:
    """Raises InvalidStep for bytes that are no such message."""
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise InvalidStep([("request", f"is not a {kind.DESCRIPTOR.full_name}")], reason="MALFORMED_REQUEST") from None


def as_ours(error: BaseException, method: str) -> NearloopError:
    """What is not an error of ours becomes INTERNAL with an id to find in the log."""
    if isinstance(error, NearloopError):
        return error
    error_id = os.urandom(6).hex()
    # Type and place only: the text of a foreign exception can quote a payload.
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("internal error %s in %s: %s\n%s", error_id, method, type(error).__name__, where)
    return NearloopError(f"internal error {error_id}: the gateway's log says more")

"""A step held by this worker, with what the acknowledgement subject tells about it."""

from collections.abc import Callable
from typing import NamedTuple

from gateway import subjects
from gateway.edge import codec
from gateway.edge import headers as h
from gateway.edge.link import Link
from gateway.ports import Queue
from gateway.types import Step

_NANO = 1_000_000_000


class AckInfo(NamedTuple):
    """Parts of `$JS.ACK...`. stored_ns: when the message was stored, nanoseconds since 1970."""

    delivered: int
    sequence: int
    stored_ns: int
    pending: int


def read_ack(subject: str) -> AckInfo:
    """Both forms: `$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>`, and the newer one with domain and
    account in front of the stream and, at times, a random token at the end. Raises ValueError.
    """
    words = subject.split(".")
    if words[:2] != ["$JS", "ACK"] or (len(words) != 9 and len(words) < 11):
        raise ValueError(f"{subject!r} is not an acknowledgement subject")
    first = 4 if len(words) == 9 else 6
    return AckInfo(int(words[first]), int(words[first + 1]), int(words[first + 3]), int(words[first + 4]))


class NatsDelivery:
    """Ends in exactly one of ack and nak; what comes after the first is ignored."""

    __slots__ = (
        "_ack_subject",
        "_ended",
        "_link",
        "_on_end",
        "_subject",
        "again",
        "attempt",
        "headers",
        "pending",
        "queue",
        "queued_us",
        "reply_to",
        "step",
    )

    def __init__(
        self,
        link: Link,
        queue: Queue,
        subject: str,
        ack_subject: str,
        raw: bytes,
        body: bytes,
        wall_s: float,
        unsure_until_s: float,
        on_end: Callable[[str], None],
    ) -> None:
        """unsure_until_s: of what was stored until then (wall clock) the server may have forgotten a delivery. Raises ValueError or
        KeyError for a message that is not a step."""
        info, found = read_ack(ack_subject), h.parse(raw)
        self._link, self._ack_subject, self._ended, self._on_end = link, ack_subject, False, on_end
        self.step: Step = codec.read_step(subject, found, body)
        self.queue = queue
        self.attempt, self.pending = info.delivered, info.pending
        self.again = info.delivered > 1 or info.stored_ns <= unsure_until_s * 1e9
        self.queued_us = max(0, round(wall_s * 1e6 - info.stored_ns / 1e3))
        self.reply_to = found.get(subjects.H_REPLY, "")
        self.headers = raw
        self._subject = subject

    @property
    def answered_by_commit(self) -> bool:
        return subjects.is_republished(self.reply_to, self.step.id)

    def ack(self) -> None:
        self._end(b"+ACK")

    def nak(self, delay_s: float = 0.0) -> None:
        self._end(b'-NAK {"delay": %d}' % round(delay_s * _NANO) if delay_s > 0 else b"-NAK")

    def let_go(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(self._subject)

    def _end(self, word: bytes) -> None:
        if not self._ended:
            self._ended = True
            self._link.send(self._ack_subject, word)
            self._on_end(self._subject)

    def in_progress(self) -> None:
        if not self._ended:
            self._link.send(self._ack_subject, b"+WPI")

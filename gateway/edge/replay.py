"""Events again: a scatter request that only the worker which executes the step answers, one message for each event."""

from collections.abc import Callable, Sequence

from gateway import subjects
from gateway.edge import codec
from gateway.edge import headers as h
from gateway.edge.jetstream import JetStream
from gateway.edge.link import Link
from gateway.types import StepEvent

_TIMEOUT_S = 0.5
_H_AFTER = "Nl-After"
_END = b"NATS/1.0 204 End\r\n\r\n"


async def ask(js: JetStream, tenant: str, step_id: str, attempt: int, after_sequence: int) -> Sequence[StepEvent]:
    """Empty when nobody answers soon or nobody listens at all."""
    headers = h.block(f"{subjects.H_ATTEMPT}: {attempt}\r\n{_H_AFTER}: {after_sequence}\r\n")
    messages, _ = await js.collect(subjects.replay(tenant, step_id), b"", _TIMEOUT_S, headers)
    return [codec.read_event(step_id, message.headers, message.data) for message in messages]


class ReplayServer:
    def __init__(self, link: Link, answer: Callable[[str, str, int, int], Sequence[StepEvent] | None]) -> None:
        self._link, self._answer = link, answer

    def on_request(self, subject: str, reply: str, headers: bytes, _data: bytes) -> None:
        _, _, tenant, step_id = subject.split(".")
        found = h.parse(headers)
        events = self._answer(tenant, step_id, int(found[subjects.H_ATTEMPT]), int(found[_H_AFTER]))
        if events is None or not reply:
            return
        for event in events:
            body = event.payload.data if event.payload is not None else b""
            self._link.send(reply, body, codec.event_headers(event))
        self._link.send(reply, b"", _END)

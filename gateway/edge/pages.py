"""Reading all messages of a stream that match a subject, page by page with batched direct gets."""

import json

from gateway.edge import headers as h
from gateway.edge.jetstream import JetStream, Message, NoAnswer

_PAGE = 256
_TIMEOUT_S = 5.0


async def read_subjects(js: JetStream, stream: str, pattern: str) -> list[Message]:
    """In the order of the stream. From whichever replica answers, which can lag behind. Raises NoAnswer."""
    found: list[Message] = []
    sequence = 1
    while True:
        body = json.dumps({"seq": sequence, "next_by_subj": pattern, "batch": _PAGE}).encode()
        page, end = await js.collect(f"{js.prefix}.DIRECT.GET.{stream}", body, _TIMEOUT_S)
        code = h.status(end.headers)[0] if end is not None else 0
        if code not in (204, 404):
            raise NoAnswer(f"the stream {stream} did not answer ({code})")
        for message in page:
            fields = h.parse(message.headers)
            sequence = int(fields["Nats-Sequence"]) + 1
            found.append(Message(fields["Nats-Subject"], message.headers, message.data, sequence - 1))
        if code == 404 or len(page) < _PAGE:
            return found

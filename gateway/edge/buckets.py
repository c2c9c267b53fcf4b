"""Reading a key-value bucket whole, in a few requests."""

import json
from collections.abc import AsyncGenerator

from gateway.edge import headers as h
from gateway.edge.jetstream import JetStream, Message, NoAnswer

_PAGE = 256
_TIMEOUT_S = 5.0
H_OPERATION = "KV-Operation"  # DEL or PURGE marks a key that is gone; a reason marks one whose time was over
_MARKER = "Nats-Marker-Reason"


async def entries(js: JetStream, bucket: str, keys: str = ">") -> AsyncGenerator[Message, None]:
    """The last message of each key that matches, the oldest first, page by page with batched direct gets. Raises NoAnswer."""
    sequence = 1
    while True:
        body = json.dumps({"seq": sequence, "next_by_subj": f"$KV.{bucket}.{keys}", "batch": _PAGE}).encode()
        found, end = await js.collect(f"{js.prefix}.DIRECT.GET.KV_{bucket}", body, _TIMEOUT_S)
        code = h.status(end.headers)[0] if end is not None else 0
        if code not in (204, 404):
            raise NoAnswer(f"the bucket {bucket} did not answer ({code})")
        for message in found:
            fields = h.parse(message.headers)
            sequence = int(fields["Nats-Sequence"]) + 1
            yield Message(fields["Nats-Subject"], message.headers, message.data, sequence - 1)
        if code == 404 or len(found) < _PAGE:
            return


def is_gone(headers: bytes) -> bool:
    """True for the mark that a removed key leaves."""
    if not headers:
        return False
    fields = h.parse(headers)
    return H_OPERATION in fields or _MARKER in fields

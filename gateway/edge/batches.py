"""Atomic batches: messages of one stream that are stored together or not at all."""

import asyncio
import random
import secrets
from collections.abc import Sequence

from gateway.edge.headers import block
from gateway.edge.jetstream import ApiError, JetStream, NoAnswer

# The server takes 50 open batches a stream, from all gateways together.
_BATCHES_AT_ONCE = 32
_TOO_MANY_BATCHES = frozenset({10210, 10176, 10211})  # too many in flight; its rest is then an incomplete batch
_BUSY_TRIES = 50

Line = tuple[str, str, bytes]  # subject, run of header lines, body


class Batches:
    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_BATCHES_AT_ONCE)
        self._random = random.Random()

    async def store(self, js: JetStream, messages: Sequence[Line]) -> None:
        """Returns when all are durable. Raises ApiError (nothing is stored), NoAnswer (all or nothing is), InvalidStep (too large)."""
        async with self._slots:
            for _ in range(_BUSY_TRIES):
                try:
                    return await self._store(js, messages)
                except ApiError as error:
                    if error.err_code not in _TOO_MANY_BATCHES:
                        raise
                await asyncio.sleep(self._random.uniform(0.002, 0.02))
        raise NoAnswer("too many batches are open")

    async def _store(self, js: JetStream, messages: Sequence[Line]) -> None:
        """All leave in one write. A new batch id each time, since a batch cannot be continued."""
        batch = f"Nats-Batch-Id: {secrets.token_hex(8)}\r\nNats-Batch-Sequence: "
        for number, (subject, lines, body) in enumerate(messages[:-1], 1):
            if not js.link.send(subject, body, block(f"{batch}{number}\r\n{lines}")):
                raise NoAnswer("the send buffer is full")
        subject, lines, body = messages[-1]
        await js.publish(subject, body, block(f"{batch}{len(messages)}\r\nNats-Batch-Commit: 1\r\n{lines}"))

"""The bucket `nl-policy`: `nats kv put nl-policy <policy>.<parameter> <value>` changes a policy in every process that has it.

Each process reads the bucket every second. That is one small request, and right after lost messages, reconnects and refused writes, which a
subscription would not be. What became of a value is told under `status.<process>.<policy>.<parameter>`.
"""

import asyncio
import json
import logging
from collections.abc import Callable

from gateway import subjects
from gateway.edge import buckets, codec
from gateway.edge import headers as h
from gateway.edge.jetstream import ApiError, JetStream, NoAnswer
from gateway.ports import Verdict

log = logging.getLogger(__name__)

LOOK_S = 1.0
_STATUS_KEEP_S = 7 * 86_400


class PolicyBucket:
    def __init__(self, js: JetStream, process: str, change: Callable[[str, str, str | None], Verdict]) -> None:
        self._js = js
        self._process = process if subjects.is_id(process) else "unnamed"
        self._change = change
        self._seen: dict[str, int] = {}  # by key: the revision that was looked at
        self._refused: dict[str, tuple[str, int]] = {}  # by key: value and revision
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """What is in the bucket counts when this returns, unless NATS does not answer: then it counts later."""
        await self._look_quietly()
        self._task = asyncio.create_task(self._follow(), name="follow nl-policy")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look_quietly()

    async def _look_quietly(self) -> None:
        try:
            await self.look()
        except (NoAnswer, ApiError) as error:
            log.debug("the bucket %s could not be read: %s", subjects.POLICY_BUCKET, error)
        except Exception:
            log.exception("the bucket %s could not be read", subjects.POLICY_BUCKET)

    async def look(self) -> None:
        """Applies what has changed since the last time. Raises NoAnswer."""
        present, changed = set(), False
        async for entry in buckets.entries(self._js, subjects.POLICY_BUCKET, "*.*"):
            key = entry.subject.split(".", 2)[2]
            present.add(key)
            if self._seen.get(key) == entry.sequence:
                continue
            known, self._seen[key] = key in self._seen, entry.sequence
            gone = buckets.is_gone(entry.headers)
            if gone and not known:
                continue
            changed = True
            await self._take(key, None if gone else entry.data.decode("utf-8", "replace"), entry.sequence)
        for key in self._seen.keys() - present:  # purged without a mark
            del self._seen[key]
            await self._take(key, None, 0)
        # Parameters can be right only together, whatever the order in which they are read: another one may have made room.
        while changed and await self._try_again():
            pass

    async def _try_again(self) -> bool:
        """True when a value that was refused is applied by now."""
        applied = False
        for key, (text, revision) in list(self._refused.items()):
            policy, parameter = key.split(".")
            if self._change(policy, parameter, text).applied:
                await self._take(key, text, revision)
                applied = True
        return applied

    async def _take(self, key: str, text: str | None, revision: int) -> None:
        policy, parameter = key.split(".")
        verdict = self._change(policy, parameter, text)
        self._refused.pop(key, None)
        if not verdict.applied and text is not None:
            self._refused[key] = (text, revision)
        if verdict.applied:
            log.info("policy %s, revision %d in %s: %s", policy, revision, subjects.POLICY_BUCKET, verdict.message)
        else:
            log.error("%s, revision %d in %s, is refused, the old value stays: %s", key, revision, subjects.POLICY_BUCKET, verdict.message)
        state = {"state": "applied" if verdict.applied else "refused", "revision": revision, "value": text, "message": verdict.message}
        headers = h.block(f"{codec.H_TTL}: {_STATUS_KEEP_S}s\r\n")
        await self._js.publish(f"$KV.{subjects.POLICY_BUCKET}.status.{self._process}.{key}", json.dumps(state).encode(), headers)

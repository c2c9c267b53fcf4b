"""A collection in shards: its operations as inner steps for the shards, side by side.

    query    to all shards, with the vector, so that a text is embedded once; the best hits of all
    count    to all shards; the sum
    upsert   each point to the shard that its id chooses; a shard embeds the texts of its own points
    delete   to all shards: an id may still have a point where it was written before a shard was added

A shard is missing when its step did not get an answer: nobody serves it, a policy refused, the time was over, its store failed. With
missing = "fail" a query or count fails then; with "partial" its answer says which shards are not in it, and one must have answered. A
write always fails when a shard did not take its part. That a shard is another kind of collection than it should be is never "missing".
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pydantic_core import from_json, to_json

from gateway.config import CollectionSection
from gateway.errors import Expired, NearloopError, StepFailed
from gateway.ports import Work
from gateway.types import Payload, Target
from workers.retrieve_input import FACTS
from workers.shards import Batch, Hit, PointId, batches, merge

_MERGE_SHARE, _MOST_MERGE_S = 0.1, 0.5  # of the time that is left: kept for merging
_LARGE_BYTES = 64 * 1024
_SHOWN_CHARACTERS = 2000  # of ids in an error: its text travels in a header
_MISTAKES = frozenset({"INVALID_ARGUMENT", "FAILED_PRECONDITION"})  # of the setup: no other moment makes them right

T = TypeVar("T")


class ShardCalls(Protocol):
    """The part of `InnerCalls` that is needed here."""

    async def retrieve(self, collection: str, payload: Payload, before_s: float) -> Payload: ...

    def collection(self, name: str) -> Target | None: ...


class Scatter:
    """The operations on one collection in shards. timeout_s: its target's; most_bytes: of one step's input."""

    def __init__(self, section: CollectionSection, calls: ShardCalls, timeout_s: float, most_bytes: int) -> None:
        self._section = section
        self._calls = calls
        self._timeout_s = timeout_s
        self._most_bytes = most_bytes

    def left_s(self, work: Work) -> Callable[[], float]:
        """Asked when the step begins; then says what is left of its time, the target's time-out included."""
        beyond_s = max(work.remaining_s() - self._timeout_s, 0.0)
        return lambda: work.remaining_s() - beyond_s

    async def query(self, work: Work, left_s: float, vector: Sequence[float], limit: int, equal: Mapping[str, Any]) -> dict[str, object]:
        """Raises StepFailed (SHARD_MISSING, SHARD_INVALID)."""
        body = to_json({"op": "query", "vector": vector, "limit": limit, **({"filter": equal} if equal else {})})
        answers, missing = await self._from_all(work, left_s, body, _hits)
        return {"hits": merge(answers, limit)} | missing

    async def count(self, work: Work, left_s: float) -> dict[str, object]:
        """Raises StepFailed (SHARD_MISSING, SHARD_INVALID)."""
        answers, missing = await self._from_all(work, left_s, to_json({"op": "count"}), _count)
        return {"count": sum(answers)} | missing

    async def upsert(self, work: Work, left_s: float, points: Sequence[Mapping[str, Any]]) -> dict[str, object]:
        """Raises StepFailed (SHARD_MISSING, SHARD_INVALID) with the ids that were not stored."""
        split = (points, self._section.shards, self._most_bytes)
        large = len(work.step.input.data) > _LARGE_BYTES
        parts = await asyncio.to_thread(batches, *split) if large else batches(*split)
        await self._write(work, left_s, parts, "stored")
        return {"upserted": len(points)}

    async def delete(self, work: Work, left_s: float, ids: Sequence[PointId]) -> dict[str, object]:
        """Raises StepFailed (SHARD_MISSING, SHARD_INVALID) with the ids that may still be there."""
        batch = Batch(tuple(ids), to_json({"op": "delete", "ids": ids}))
        await self._write(work, left_s, {shard: [batch] for shard in self._section.shards}, "deleted everywhere")
        return {"deleted": len(ids)}

    async def _from_all(self, work: Work, left_s: float, body: bytes, read: Callable[[Any], T]) -> tuple[list[T], dict[str, object]]:
        """What each shard that answered said, in the order of the shards, and the words about those that did not."""
        must = self._section.missing == "fail"
        shards = self._section.shards
        answers = await _together([self._one(work, left_s, shard, body, read) for shard in shards], stop_at_first=must)
        lost = [(shard, answer) for shard, answer in zip(shards, answers, strict=True) if isinstance(answer, NearloopError)]
        got = [answer[0] for answer in answers if isinstance(answer, tuple)]
        for shard, error in lost:
            if must or error.code in _MISTAKES:
                raise self._failed(shard, error)
        if not got:
            raise self._failed(*lost[0], f"; {', '.join(shards)} are all missing")
        return got, {"partial": True, "missing": [shard for shard, _ in lost]} if lost else {}

    async def _write(self, work: Work, left_s: float, parts: Mapping[str, Sequence[Batch]], done: str) -> None:
        """The batches of a shard go one after the other, so that a large write does not crowd out queries."""
        undone: list[PointId] = []
        failures: list[tuple[str, NearloopError]] = []

        async def write(shard: str) -> tuple[None]:
            for index, batch in enumerate(parts[shard]):
                try:
                    await self._one(work, left_s, shard, batch.data, _anything)
                except NearloopError as error:
                    failures.append((shard, error))
                    undone.extend(point_id for rest in parts[shard][index:] for point_id in rest.ids)
                    break
            return (None,)

        await _together([write(shard) for shard in parts], stop_at_first=False)
        if failures:
            ids = list(dict.fromkeys(undone))
            raise self._failed(*failures[0], f"; {len(ids)} points are not {done}, as far as is known: {_shown(ids)}")

    async def _one(self, work: Work, left_s: float, shard: str, body: bytes, read: Callable[[Any], T]) -> tuple[T]:
        """Raises NearloopError."""
        self._check(shard)
        spare_s = min(left_s * _MERGE_SHARE, _MOST_MERGE_S)
        within_s = max(left_s - spare_s, 0.0)
        try:
            async with asyncio.timeout(within_s):
                output = await self._calls.retrieve(shard, Payload(body), max(work.remaining_s() - within_s, 0.0))
        except TimeoutError:
            raise Expired("it did not answer in time") from None
        try:
            large = len(output.data) > _LARGE_BYTES
            return (read(await asyncio.to_thread(from_json, output.data) if large else from_json(output.data)),)
        except (ValueError, LookupError, TypeError):
            raise StepFailed("its answer is not that of a collection", code="FAILED_PRECONDITION", reason="SHARD_INVALID") from None

    def _check(self, shard: str) -> None:
        """What another worker announces of it must fit. Raises StepFailed."""
        target = self._calls.collection(shard)
        facts = (target.input_schema or {}).get(FACTS) if target is not None else None
        if not isinstance(facts, Mapping):
            return
        problem = "has shards itself" if facts.get("shards") else ""
        for word in ("dimensions", "embed_target"):
            if facts.get(word) != getattr(self._section, word):
                problem = f"has another {word}"
        if problem:
            raise StepFailed(f"it {problem}", code="FAILED_PRECONDITION", reason="SHARD_INVALID")

    def _failed(self, shard: str, error: NearloopError, more: str = "") -> StepFailed:
        reason = error.reason if error.reason == "SHARD_INVALID" else "SHARD_MISSING"
        message = f"shard {shard!r} of collection {self._section.name!r}: {error.message}{more}"
        return StepFailed(message, code=error.code, reason=reason)


async def _together(calls: Sequence[Coroutine[Any, Any, T]], *, stop_at_first: bool) -> list[T | NearloopError | None]:
    """What each gave or raised; None for those that were stopped after the first failure. Leaves no task behind."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION if stop_at_first else asyncio.ALL_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    answers: list[T | NearloopError | None] = []
    for answer in ended:
        if isinstance(answer, BaseException) and not isinstance(answer, NearloopError | asyncio.CancelledError):
            raise answer
        answers.append(None if isinstance(answer, asyncio.CancelledError) else answer)
    return answers


def _hits(answer: Any) -> list[Hit]:
    """Raises LookupError, TypeError, ValueError."""
    return [{"id": hit["id"], "score": _number(hit["score"]), "payload": hit["payload"]} for hit in answer["hits"]]


def _count(answer: Any) -> int:
    return int(answer["count"])


def _anything(answer: Any) -> None: ...


def _number(score: Any) -> float | None:
    return None if score is None else float(score)


def _shown(ids: Sequence[PointId]) -> str:
    """As many as fit into an error; the whole write can be repeated."""
    shown, size = [], 0
    for point_id in ids:
        text = repr(point_id)
        if size + len(text) > _SHOWN_CHARACTERS:
            break
        shown.append(text)
        size += len(text) + 2
    return ", ".join(shown) + (f" and {len(ids) - len(shown)} more" if len(shown) < len(ids) else "")

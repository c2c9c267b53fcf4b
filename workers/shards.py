"""A collection in shards: which shard has a point, and what the hits of all shards are together. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import to_json

from workers.rendezvous import highest

PointId = int | str
Hit = Mapping[str, Any]  # {"id", "score", "payload"}
_HEAD, _TAIL = b'{"op":"upsert","points":[', b"]}"


class Batch(NamedTuple):
    """An upsert for one shard: the ids in it, and its JSON."""

    ids: tuple[PointId, ...]
    data: bytes


def shard_of(point_id: PointId, shards: Sequence[str]) -> str:
    """7 and "7" are different ids."""
    return highest(f"{'n' if isinstance(point_id, int) else 't'}{point_id}", shards)


def batches(points: Sequence[Mapping[str, Any]], shards: Sequence[str], most_bytes: int) -> dict[str, list[Batch]]:
    """The points of each shard that gets any, in their order, in upserts of at most most_bytes. A larger point goes alone: its shard says
    what it thinks of it."""
    found: dict[str, list[Batch]] = {}
    open_: dict[str, tuple[list[PointId], list[bytes], int]] = {}
    frame = len(_HEAD) + len(_TAIL)
    for point in points:
        data = to_json(point)
        shard = shard_of(point["id"], shards)
        ids, parts, size = open_.get(shard, ([], [], frame))
        if parts and size + len(data) + 1 > most_bytes:
            found.setdefault(shard, []).append(_close(ids, parts))
            ids, parts, size = [], [], frame
        ids.append(point["id"])
        parts.append(data)
        open_[shard] = (ids, parts, size + len(data) + 1)
    for shard, (ids, parts, _) in open_.items():
        found.setdefault(shard, []).append(_close(ids, parts))
    return found


def _close(ids: list[PointId], parts: list[bytes]) -> Batch:
    return Batch(tuple(ids), _HEAD + b",".join(parts) + _TAIL)


def merge(answers: Sequence[Sequence[Hit]], limit: int) -> list[Hit]:
    """The best `limit` hits of all shards: by score, ties by id (numbers before texts), then by the order of the shards.

    A point that several shards have counts once, with its best score. When each shard gave its own best `limit` in this order, the result
    is what one collection with all points would give.
    """
    best: dict[tuple[bool, PointId], Hit] = {}
    for hits in answers:
        for hit in hits:
            key = (isinstance(hit["id"], str), hit["id"])
            if key not in best or _score(hit) > _score(best[key]):
                best[key] = hit
    return [hit for _, hit in sorted(best.items(), key=lambda item: (-_score(item[1]), item[0]))[:limit]]


def _score(hit: Hit) -> float:
    score = hit["score"]
    return float("-inf") if score is None else float(score)  # None: no number, as JSON says it

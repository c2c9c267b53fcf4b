"""Which shard has a point, and what the hits of all are together."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json

from workers.rendezvous import highest
from workers.shards import Hit, batches, merge, shard_of

IDS = st.integers(0, 30) | st.integers(0, 30).map(str)
SCORES = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1)
NAMES = st.lists(st.text("abc", min_size=1, max_size=3), unique=True, min_size=1, max_size=8)


def best(points: list[tuple[Any, float]], limit: int) -> list[dict[str, Any]]:
    """What one collection gives, which has each id once: by score, ties by id."""
    ordered = sorted(points, key=lambda point: (-point[1], isinstance(point[0], str), point[0]))
    found: dict[tuple[bool, Any], dict[str, Any]] = {}
    for point_id, score in ordered:
        found.setdefault((isinstance(point_id, str), point_id), {"id": point_id, "score": score, "payload": {}})
    return list(found.values())[:limit]


@given(st.lists(st.tuples(IDS, SCORES, st.integers(0, 4)), max_size=60), st.integers(1, 12))
def test_the_best_of_the_shards_are_the_best_of_all_for_any_split(points: list[tuple[Any, float, int]], limit: int) -> None:
    """A point may be in several shards, with another score in each."""
    shards = [best([(one, score) for one, score, shard in points if shard == number], limit) for number in range(5)]
    assert merge(shards, limit) == best([(one, score) for one, score, _ in points], limit)


def test_a_tie_of_one_point_goes_to_the_first_shard_and_no_score_comes_last() -> None:
    shards: list[list[Hit]] = []
    for shard in ("a", "b"):
        shards.append([{"id": 1, "score": 0.5, "payload": {"from": shard}}, {"id": shard, "score": None, "payload": {}}])
    assert [(hit["id"], hit["payload"]) for hit in merge(shards, 9)] == [(1, {"from": "a"}), ("a", {}), ("b", {})]


@given(st.lists(IDS, max_size=40), NAMES, st.text("abc", min_size=4, max_size=4))
def test_a_new_shard_takes_points_and_moves_no_others(ids: list[Any], shards: list[str], added: str) -> None:
    for point_id in ids:
        before, after = shard_of(point_id, shards), shard_of(point_id, [*shards, added])
        assert after in (before, added)
        assert shard_of(point_id, shards[::-1]) == before


def test_points_are_spread_and_a_number_is_not_its_text() -> None:
    shards = [f"docs-{number}" for number in range(4)]
    counts = Counter(shard_of(number, shards) for number in range(4000))
    assert all(800 < counts[shard] < 1200 for shard in shards)
    assert any(shard_of(number, shards) != shard_of(str(number), shards) for number in range(20))
    assert sum(shard_of(n, shards) != shard_of(n, [*shards, "docs-4"]) for n in range(4000)) < 4000 / 5 * 1.25


def test_the_hash_stays_what_it_is() -> None:
    """Points are where an earlier version has put them."""
    shards = ["docs-0", "docs-1", "docs-2"]
    assert [shards.index(shard_of(one, shards)) for one in (1, 5, 8, "1", "a/b", "é", "c", "d")] == [1, 0, 1, 1, 2, 2, 0, 0]


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError):
        highest("a", [])


@given(st.lists(IDS, min_size=1, max_size=40), NAMES, st.integers(1, 400))
def test_batches_hold_each_point_once_in_its_shard_and_keep_to_the_size(ids: list[Any], shards: list[str], most_bytes: int) -> None:
    points = [{"id": one, "text": "x" * (position % 7)} for position, one in enumerate(ids)]
    found = batches(points, shards, most_bytes)
    for shard, parts in found.items():
        written = []
        for part in parts:
            body = from_json(part.data)
            assert body["op"] == "upsert"
            assert tuple(point["id"] for point in body["points"]) == part.ids
            assert len(part.data) <= most_bytes or len(part.ids) == 1
            written += body["points"]
        assert written == [point for point in points if shard_of(point["id"], shards) == shard]
    assert sum(len(part.ids) for parts in found.values() for part in parts) == len(points)

"""Round trips as entries of a bucket, which anybody may have written."""

import pytest

from gateway import round_trips
from gateway.run_types import RoundTrip


@pytest.mark.parametrize(
    ("trip", "key"),
    [(RoundTrip("home", "iad", 0.08, 5), "link.home.iad"), (RoundTrip("iad", "tool.fetch", 0.5), "api.iad.tool.fetch")],
)
def test_an_entry_is_read_as_it_was_written(trip: RoundTrip, key: str) -> None:
    assert round_trips.key(trip) == key
    assert round_trips.read(key, round_trips.write(trip, "w1")) == trip


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("link.home.iad", b"fast"),
        ("link.home.iad", b"[]"),
        ("link.home.iad", b"{}"),
        ("link.home.iad", b'{"seconds": -1}'),
        ("link.home.iad", b'{"seconds": NaN}'),
        ("link.home.iad", b'{"seconds": true}'),
        ("link.home.iad", b'{"seconds": "1"}'),
        ("link.home.iad", b'{"seconds": 1, "samples": 0}'),
        ("link.home.iad", b"\xff"),
        ("link.home", b'{"seconds": 1}'),
        ("link.home.tool.fetch", b'{"seconds": 1}'),
        ("api.home.iad", b'{"seconds": 1}'),
        ("other.home.iad", b'{"seconds": 1}'),
    ],
)
def test_what_is_no_round_trip_is_refused(key: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        round_trips.read(key, data)


def test_together_they_are_what_is_known() -> None:
    trips = round_trips.collect([RoundTrip("a", "b", 0.2), RoundTrip("b", "a", 0.1), RoundTrip("a", "infer.plan", 0.3)])
    assert (trips.between("a", "b"), trips.between("a", "a"), trips.between("a", "c")) == (0.1, 0.0, None)
    assert (trips.to_target("a", "infer.plan"), trips.to_target("b", "infer.plan")) == (0.3, None)

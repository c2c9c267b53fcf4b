"""Measured round trips as entries of the bucket `nl-regions`, and what is known of the network when they are put together. Pure."""

import json
import math
from collections.abc import Iterable

from gateway.run_types import RoundTrip, RoundTrips

KEEP_S = 300.0  # a measurement that nobody repeats says nothing about now


def key(trip: RoundTrip) -> str:
    """`link.<from>.<to>` between regions, `api.<region>.<kind>.<target>` for what a target calls."""
    return f"{'api' if '.' in trip.to else 'link'}.{trip.region}.{trip.to}"


def write(trip: RoundTrip, worker: str) -> bytes:
    return json.dumps({"seconds": trip.seconds, "samples": trip.samples, "worker": worker}).encode()


def read(key: str, data: bytes) -> RoundTrip:
    """Raises ValueError for what is not a round trip."""
    kind, _, rest = key.partition(".")
    region, _, to = rest.partition(".")
    found = json.loads(data)
    if not isinstance(found, dict) or kind not in ("link", "api") or not region or not to or ("." in to) != (kind == "api"):
        raise ValueError("not a round trip")
    seconds, samples = found.get("seconds"), found.get("samples", 1)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
        raise ValueError("seconds is not a number of seconds")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError("samples is not a count")
    return RoundTrip(region, to, float(seconds), samples)


def collect(trips: Iterable[RoundTrip]) -> RoundTrips:
    regions: dict[tuple[str, str], float] = {}
    targets: dict[tuple[str, str], float] = {}
    for trip in trips:
        (targets if "." in trip.to else regions)[(trip.region, trip.to)] = trip.seconds
    return RoundTrips(regions, targets)

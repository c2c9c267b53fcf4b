"""Streams, buckets and consumers: what they must be, made when missing, checked when there.

Raw `$JS.API` JSON throughout: nats-py does not know priority groups and would erase them when it writes a configuration back.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from gateway import round_trips, subjects
from gateway.config import Config
from gateway.edge.jetstream import NOT_FOUND_CONSUMER, NOT_FOUND_STREAM, ApiError, JetStream, NoAnswer, until_answered
from gateway.errors import TopologyMismatch
from gateway.types import LANES, Kind, Lane, Target

PRIORITY_GROUP = "near"
_NANO = 1_000_000_000
_DUPLICATE_WINDOW_S = 120
_MAX_ACK_PENDING = 5000
_MAX_WAITING = 4096

# Field, and the option of `nats stream edit` that changes it; a field without one needs a new stream.
_STREAM_FIELDS = {
    "retention": "",
    "storage": "",
    "discard": "",
    "subjects": "--subjects",
    "max_msgs": "--max-msgs",
    "max_bytes": "--max-bytes",
    "max_age": "--max-age",
    "max_msgs_per_subject": "--max-msgs-per-subject",
    "num_replicas": "--replicas",
    "allow_direct": "--allow-direct",
    "allow_atomic": "--allow-batch",
    "allow_msg_ttl": "--allow-msg-ttl",
    "republish": "",
}
_CONSUMER_FIELDS = ("filter_subject", "ack_policy", "ack_wait", "max_deliver", "priority_policy", "priority_groups")


def _stream(name: str, stream_subjects: list[str], replicas: int, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "subjects": stream_subjects,
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
        "max_consumers": -1,
        "num_replicas": replicas,
        "duplicate_window": _DUPLICATE_WINDOW_S * _NANO,
        "allow_direct": True,
    } | more


def steps_stream(config: Config, region: str) -> dict[str, Any]:
    """The work queue of a region, with the records of its jobs."""
    return _stream(
        subjects.steps_stream(region),
        subjects.steps_stream_subjects(region),
        config.nats.replicas,
        retention="workqueue",
        discard="new",
        max_msgs=config.nats.max_queue_messages,
        max_bytes=config.nats.max_queue_bytes,
        allow_atomic=True,
        allow_msg_ttl=True,
    )


def _bucket(name: str, replicas: int, max_age_s: float = 0, *, followed: bool = False, **more: Any) -> dict[str, Any]:
    """A key-value bucket as the NATS tools know it. followed: what is stored is told to all regions."""
    if followed:
        more["republish"] = subjects.bucket_republish(name)
    max_age = round(max_age_s * _NANO)
    return _stream(
        f"KV_{name}",
        [f"$KV.{name}.>"],
        replicas,
        discard="new",
        max_age=max_age,
        max_msgs_per_subject=1,
        duplicate_window=min(max_age or _DUPLICATE_WINDOW_S * _NANO, _DUPLICATE_WINDOW_S * _NANO),
        allow_rollup_hdrs=True,
        deny_delete=True,
        **more,
    )


def streams(config: Config, region: str) -> list[dict[str, Any]]:
    """Every stream of the servers that a region is on.

    Where there is a domain, there are others: then a stream takes the subjects of its own regions only, else each would store the
    messages of all.
    """
    nats = config.nats
    regions = config.site(region)
    taken = regions if config.domain(region) else ("",)
    heartbeats_s = max(6.0, 3 * config.worker.heartbeat_s)
    return [
        *(steps_stream(config, name) for name in regions),
        _stream(
            subjects.RESULTS_STREAM,
            subjects.of_regions("result", taken),
            nats.replicas,
            allow_msg_ttl=True,
            republish=subjects.RESULTS_REPUBLISH,
        ),
        _stream(subjects.DEAD_STREAM, subjects.of_regions("dead", taken), nats.replicas, max_age=round(nats.dead_keep_s * _NANO)),
        _stream(
            subjects.RUNS_STREAM,
            subjects.of_regions("run", taken),
            nats.replicas,
            discard="new",
            max_bytes=nats.max_queue_bytes,
            allow_atomic=True,
            allow_msg_ttl=True,
        ),
        _bucket(subjects.TARGETS_BUCKET, nats.replicas, followed=True),
        _bucket(subjects.WORKERS_BUCKET, nats.replicas, heartbeats_s, followed=True),
        _bucket(subjects.REGIONS_BUCKET, nats.replicas, round_trips.KEEP_S, followed=True),
        _bucket(subjects.POLICY_BUCKET, nats.replicas, allow_msg_ttl=True),  # the status keys of processes that are gone end
        _bucket(subjects.HANDBACKS_BUCKET, nats.replicas, allow_msg_ttl=True),  # each entry lives as long as its step
        # Each entry lives as long as the journal that refers to it.
        _bucket(subjects.VALUES_BUCKET, nats.replicas, allow_msg_ttl=True, max_bytes=nats.max_queue_bytes),
    ]


def consumer(config: Config, region: str, kind: Kind, target: str, lane: Lane) -> dict[str, Any]:
    """The consumer of a lane. Attempts are counted by the worker, so the server never gives up."""
    return {
        "durable_name": subjects.consumer(kind, target, lane),
        "name": subjects.consumer(kind, target, lane),
        "filter_subject": subjects.queue_filter(region, kind, target, lane),
        "deliver_policy": "all",
        "ack_policy": "explicit",
        "ack_wait": round(config.nats.ack_wait_s * _NANO),
        "max_deliver": -1,
        "max_ack_pending": _MAX_ACK_PENDING,
        "max_waiting": _MAX_WAITING,
        "replay_policy": "instant",
        "num_replicas": 0,
        "priority_policy": "prioritized",
        "priority_groups": [PRIORITY_GROUP],
    }


async def ensure_streams(js: JetStream, config: Config, region: str) -> None:
    """Those of the region's servers, which `js` is on. Raises TopologyMismatch, Unavailable."""
    await asyncio.gather(*(_ensure_stream(js, wanted) for wanted in streams(config, region)))


async def _ensure_stream(js: JetStream, wanted: Mapping[str, Any]) -> None:
    await until_answered(f"stream {wanted['name']}", lambda _: _make_stream(js, wanted))


async def _make_stream(js: JetStream, wanted: Mapping[str, Any]) -> None:
    name = wanted["name"]
    try:
        found = (await js.api(f"STREAM.INFO.{name}"))["config"]
    except ApiError as error:
        if error.err_code != NOT_FOUND_STREAM:
            raise _refused("stream", name, error) from None
        try:
            # Several processes may come here at once: the same configuration twice is fine for the server.
            found = (await js.api(f"STREAM.CREATE.{name}", wanted))["config"]
        except ApiError as refusal:
            raise _refused("stream", name, refusal) from None
    for field, option in _STREAM_FIELDS.items():
        want, have = wanted.get(field), found.get(field)
        if _differ(want, have):
            edit = (
                f"`nats stream edit {name} {option}{'' if want is True else '=' + _shown(field, want)}`"
                if option
                else f"`nats stream rm {name}` (its messages are lost)"
            )
            raise TopologyMismatch(
                f"stream {name} has {field} {_shown(field, have)}, the configuration wants {_shown(field, want)}:"
                f" change the configuration or run {edit}"
            )


async def ensure_consumers(js: JetStream, config: Config, targets: Iterable[Target], regions: Iterable[str]) -> None:
    """The queues of the targets in regions whose servers `js` reaches. Raises TopologyMismatch, Unavailable."""
    await asyncio.gather(
        *(ensure_consumer(js, config, region, target.kind, target.name, lane) for region in regions for target in targets for lane in LANES)
    )


async def ensure_consumer(js: JetStream, config: Config, region: str, kind: Kind, target: str, lane: Lane) -> None:
    stream, wanted = subjects.steps_stream(region), consumer(config, region, kind, target, lane)
    await until_answered(f"consumer {wanted['name']} of {stream}", lambda _: _ensure_consumer(js, stream, wanted))


async def _ensure_consumer(js: JetStream, stream: str, wanted: Mapping[str, Any]) -> None:
    name = wanted["name"]
    try:
        found = (await js.api(f"CONSUMER.INFO.{stream}.{name}"))["config"]
    except ApiError as error:
        if error.err_code == NOT_FOUND_STREAM:
            raise NoAnswer(f"stream {stream} is not there yet") from None  # its own region makes it
        if error.err_code != NOT_FOUND_CONSUMER:
            raise _refused("consumer", f"{stream} {name}", error) from None
        body = {"stream_name": stream, "config": wanted, "action": "create"}
        try:
            found = (await js.api(f"CONSUMER.CREATE.{stream}.{name}.{wanted['filter_subject']}", body))["config"]
        except ApiError as refusal:
            raise _refused("consumer", f"{stream} {name}", refusal) from None
    for field in _CONSUMER_FIELDS:
        want, have = wanted.get(field), found.get(field)
        if _differ(want, have):
            raise TopologyMismatch(
                f"consumer {name} of stream {stream} has {field} {_shown(field, have)}, the configuration wants {_shown(field, want)}:"
                f" change the configuration or run `nats consumer rm {stream} {name}` (no message is lost), it is made again"
            )


def _differ(want: Any, have: Any) -> bool:
    if isinstance(want, list):
        return sorted(want) != sorted(have or [])
    return (want or 0) != (have or 0)  # the server leaves out what is false or zero


def _shown(field: str, value: Any) -> str:
    if field in ("max_age", "ack_wait"):
        return f"{(value or 0) / _NANO:g}s"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _refused(what: str, name: str, error: ApiError) -> TopologyMismatch:
    return TopologyMismatch(f"NATS refused {what} {name}: {error}; is JetStream enabled, version 2.12 or newer, and large enough?")

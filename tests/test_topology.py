"""Streams and consumers are made as they must be, once, and an existing one that differs is named with what to do."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from nats_process import NatsProcess, find_server

from gateway import config, subjects
from gateway.config import Config
from gateway.edge import buckets, headers, topology
from gateway.edge.jetstream import JetStream
from gateway.edge.link import Link
from gateway.edge.server_config import server_config
from gateway.errors import TopologyMismatch
from gateway.types import LANES, Kind, Lane, Target

TARGET = Target(Kind.TOOL, "echo")
BUCKETS = ("handbacks", "policy", "regions", "targets", "values", "workers")
KEPT = (*(f"KV_nl-{name}" for name in BUCKETS), "NL_DEAD", "NL_RESULTS", "NL_RUNS")  # on all servers the same


def _config(**nats: Any) -> Config:
    return config.parse({"nats": nats, "regions": [{"name": "home"}, {"name": "far-away"}]})


@pytest.fixture
async def js(own_nats_server: NatsProcess) -> AsyncIterator[JetStream]:
    link = Link(config.NatsSection(), (own_nats_server.url,), "test")
    stream = JetStream(link, 5.0)
    await link.start(10.0)
    yield stream
    await link.close()


async def test_streams_are_made_once_by_many(js: JetStream) -> None:
    await asyncio.gather(*(topology.ensure_streams(js, _config(), "home") for _ in range(5)))
    names = (await js.api("STREAM.NAMES"))["streams"]
    assert sorted(names) == [*KEPT, "NL_STEPS_FAR_AWAY", "NL_STEPS_HOME"]
    steps = (await js.api("STREAM.INFO.NL_STEPS_FAR_AWAY"))["config"]
    assert steps["subjects"] == ["nl.step.far-away.>", "nl.job.far-away.>"]
    assert (steps["retention"], steps["discard"], steps["storage"]) == ("workqueue", "new", "file")
    assert (steps["allow_atomic"], steps["allow_msg_ttl"]) == (True, True)
    assert (steps["max_msgs"], steps["max_bytes"]) == (1_000_000, 1024**3)
    workers = (await js.api("STREAM.INFO.KV_nl-workers"))["config"]
    assert workers["max_age"] == 6_000_000_000
    hand_backs = (await js.api("STREAM.INFO.KV_nl-handbacks"))["config"]
    assert (hand_backs["allow_msg_ttl"], hand_backs["max_msgs_per_subject"]) == (True, 1)
    runs = (await js.api("STREAM.INFO.NL_RUNS"))["config"]
    assert (runs["subjects"], runs["retention"], runs["discard"], runs["max_bytes"]) == (["nl.run.>"], "limits", "new", 1024**3)
    assert (runs["allow_atomic"], runs["allow_msg_ttl"], runs["allow_direct"]) == (True, True, True)


async def test_with_domains_a_stream_takes_its_own_regions_only(js: JetStream) -> None:
    near = {"nats_urls": ["nats://a"], "domain": "hub"}
    regions = [{"name": "home"} | near, {"name": "lab"} | near, {"name": "iad", "nats_urls": ["nats://b"], "domain": "iad"}]
    await topology.ensure_streams(js, config.parse({"regions": regions}), "lab")
    assert sorted((await js.api("STREAM.NAMES"))["streams"]) == [*KEPT, "NL_STEPS_HOME", "NL_STEPS_LAB"]
    for name, what in (("NL_RESULTS", "result"), ("NL_DEAD", "dead"), ("NL_RUNS", "run")):
        found = (await js.api(f"STREAM.INFO.{name}"))["config"]["subjects"]
        assert sorted(found) == [f"nl.{what}.home.>", f"nl.{what}.lab.>"]


async def test_what_a_followed_bucket_stores_is_told(js: JetStream) -> None:
    await topology.ensure_streams(js, _config(), "home")
    told: asyncio.Queue[tuple[str, bool, bytes]] = asyncio.Queue()

    def on_message(subject: str, _reply: str, headers: bytes, data: bytes) -> None:
        told.put_nowait((subject, buckets.is_gone(headers), data))

    await js.link.listen("nl.live.>", on_message)
    for bucket in (subjects.TARGETS_BUCKET, subjects.WORKERS_BUCKET, subjects.REGIONS_BUCKET, subjects.VALUES_BUCKET):
        await js.publish(subjects.bucket_key(bucket, "a.b"), b"{}", b"")
    await js.publish(subjects.bucket_key(subjects.WORKERS_BUCKET, "a.b"), b"", headers.block("KV-Operation: DEL\r\n"))
    found = [await asyncio.wait_for(told.get(), 10.0) for _ in range(4)]
    live = [(f"nl.live.nl-{name}.a.b", False, b"{}") for name in ("targets", "workers", "regions")]
    assert found == [*live, ("nl.live.nl-workers.a.b", True, b"")]


async def test_consumers_are_made_once_by_many(js: JetStream) -> None:
    await topology.ensure_streams(js, _config(), "home")
    await asyncio.gather(*(topology.ensure_consumers(js, _config(), [TARGET], ["home", "far-away"]) for _ in range(5)))
    for region in ("home", "far-away"):
        names = (await js.api(f"CONSUMER.NAMES.{subjects.steps_stream(region)}"))["consumers"]
        assert sorted(names) == sorted(f"tool-echo-{lane.value}" for lane in LANES)
    found = (await js.api("CONSUMER.INFO.NL_STEPS_HOME.tool-echo-batch"))["config"]
    assert found["filter_subject"] == "nl.step.home.tool.echo.batch.*"
    assert (found["priority_policy"], found["priority_groups"]) == ("prioritized", ["near"])
    assert (found["ack_policy"], found["ack_wait"], found["max_deliver"]) == ("explicit", 10_000_000_000, -1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"max_queue_messages": 7},
            "max_msgs 1000000, the configuration wants 7: .*`nats stream edit NL_STEPS_(HOME|FAR_AWAY) --max-msgs=7`",
        ),
        ({"max_queue_bytes": 1_000_000}, "max_bytes 1073741824, the configuration wants 1000000: .*--max-bytes=1000000"),
        ({"dead_keep_s": 3600}, "stream NL_DEAD has max_age 604800s, the configuration wants 3600s: .*--max-age=3600s"),
    ],
)
async def test_a_stream_that_differs_is_named(js: JetStream, changes: dict[str, Any], sentence: str) -> None:
    await topology.ensure_streams(js, _config(), "home")
    with pytest.raises(TopologyMismatch) as caught:
        await topology.ensure_streams(js, _config(**changes), "home")
    assert re.search(sentence, caught.value.message), caught.value.message


async def test_a_stream_of_another_kind_is_named(js: JetStream) -> None:
    await js.api("STREAM.CREATE.NL_STEPS_HOME", {"name": "NL_STEPS_HOME", "subjects": ["nl.step.home.>"], "retention": "limits"})
    with pytest.raises(TopologyMismatch, match="stream NL_STEPS_HOME has retention limits, the configuration wants workqueue"):
        await topology.ensure_streams(js, _config(), "home")


async def test_subjects_that_belong_to_another_stream_are_named(js: JetStream) -> None:
    await js.api("STREAM.CREATE.OTHER", {"name": "OTHER", "subjects": ["nl.>"]})
    with pytest.raises(TopologyMismatch, match=r"NATS refused stream .*overlap"):
        await topology.ensure_streams(js, _config(), "home")


async def test_a_consumer_that_differs_is_named_and_left_alone(js: JetStream) -> None:
    await topology.ensure_streams(js, _config(), "home")
    await topology.ensure_consumers(js, _config(), [TARGET], ["home", "far-away"])
    with pytest.raises(TopologyMismatch, match=r"has ack_wait 10s, the configuration wants 30s: .*`nats consumer rm NL_STEPS_HOME"):
        await topology.ensure_consumer(js, _config(ack_wait_s=30), "home", TARGET.kind, TARGET.name, Lane.BATCH)
    found = (await js.api("CONSUMER.INFO.NL_STEPS_HOME.tool-echo-batch"))["config"]
    assert found["ack_wait"] == 10_000_000_000


async def test_what_an_operator_added_is_no_difference(js: JetStream) -> None:
    wanted = topology.steps_stream(_config(), "home") | {"description": "ours", "metadata": {"team": "a"}}
    await js.api("STREAM.CREATE.NL_STEPS_HOME", wanted)
    await topology.ensure_streams(js, _config(), "home")
    assert (await js.api("STREAM.INFO.NL_STEPS_HOME"))["config"]["description"] == "ours"


async def test_the_production_template_is_accepted_by_the_server(tmp_path: Path) -> None:
    template = Path(__file__).parent.parent / "config" / "nats-server.conf"
    ours = tmp_path / "nats.conf"
    ours.write_text(server_config(4222, str(tmp_path / 'a "quoted" folder'), monitor_port=8222, max_store_bytes=10**9, sync_always=True))
    for path in (template, ours):
        check = await asyncio.create_subprocess_exec(
            find_server(), "-t", "-c", str(path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await check.communicate()
        assert check.returncode == 0, output.decode()

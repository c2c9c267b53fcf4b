"""A collection in shards, end to end: two shards with the worker that has the whole, the third one with a worker that comes and goes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from stack_support import eventually, running

from gateway.client import NearloopClient, RetryPolicy
from gateway.config import Config, parse
from gateway.errors import NearloopError
from gateway.types import Kind
from workers.serve import run_worker
from workers.shards import shard_of

pytestmark = pytest.mark.stack

SHARDS = ["docs-0", "docs-1", "docs-2"]
AUTH = {"anonymous_tenant": "local"}
POINTS = [{"id": n, "vector": [100 - n, n]} for n in range(20)]


def configuration() -> Config:
    own: list[dict[str, Any]] = [{"name": name, "dimensions": 2} for name in SHARDS[:2]]
    wholes = [{"name": f"docs-{missing}", "dimensions": 2, "shards": SHARDS, "missing": missing} for missing in ("fail", "partial")]
    return parse({"auth": AUTH, "gateway": {"listen": "127.0.0.1:0"}, "retrieve": {"collections": own + wholes}})


@asynccontextmanager
async def third(nats_url: str) -> AsyncIterator[None]:
    config = parse({"nats": {"urls": [nats_url]}, "retrieve": {"collections": [{"name": SHARDS[2], "dimensions": 2}]}})
    stop = asyncio.Event()
    task = asyncio.create_task(run_worker(config, Kind.RETRIEVE, "home", stop=stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def test_shards_of_two_workers() -> None:
    async with running(configuration(), triton=False, workers=[("retrieve", "home")]) as stack:
        client = NearloopClient(stack.gateway_address, retries=RetryPolicy(attempts=1))

        async def call(body: dict[str, Any], name: str = "docs-partial") -> Any:
            try:
                return (await client.execute("retrieve", name, body, timeout_s=3)).json
            except NearloopError as error:
                return error

        async def count() -> Any:
            return await call({"op": "count"})

        try:
            async with third(stack.nats_url):
                await eventually(count, lambda found: found == {"count": 0}, 15, "all shards")
                assert await call({"op": "upsert", "points": POINTS}) == {"upserted": 20}
                for name in ("docs-fail", "docs-partial"):
                    hits = (await call({"op": "query", "vector": [1, 0], "limit": 5}, name))["hits"]
                    assert [hit["id"] for hit in hits] == [0, 1, 2, 3, 4]
            there = [n for n in range(20) if shard_of(n, SHARDS) != "docs-2"]
            marked = {"count": len(there), "partial": True, "missing": ["docs-2"]}
            await eventually(count, lambda found: found == marked, 15, "a shard is missing")
            answer = await call({"op": "query", "vector": [1, 0], "limit": 5})
            assert ([hit["id"] for hit in answer["hits"]], answer["missing"]) == (there[:5], ["docs-2"])
            failed = await call({"op": "query", "vector": [1, 0]}, "docs-fail")
            assert isinstance(failed, NearloopError)
            assert (failed.code, failed.reason) == ("UNAVAILABLE", "SHARD_MISSING")
            assert "shard 'docs-2' of collection 'docs-fail'" in failed.message
            failed = await call({"op": "upsert", "points": POINTS})
            assert isinstance(failed, NearloopError)
            assert failed.message.endswith(", ".join(str(n) for n in range(20) if n not in there))
        finally:
            await client.close()

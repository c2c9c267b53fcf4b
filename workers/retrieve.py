"""Executes retrieve steps: each collection of a vector store is a target.

    {"op": "query", "text": "..." or "vector": [...], "limit": 10, "filter": {"field": value or [values]}}
        -> {"hits": [{"id": ..., "score": ..., "payload": {...}}]}
    {"op": "upsert", "points": [{"id": 1 or "any text", "text": "..." or "vector": [...], "payload": {...}}]} -> {"upserted": 1}
    {"op": "count"} -> {"count": 1}

A point's text is embedded and not kept; what a query should give back belongs in its payload. Every operation can be repeated.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence

from pydantic_core import to_json

from gateway.config import CollectionSection, Config
from gateway.errors import ConfigError, NearloopError, Rejected, StepFailed, Unavailable
from gateway.ports import Work
from gateway.types import Kind, Payload, Target
from workers.embedding import Embed
from workers.retrieve_input import NewPoint, Operation, Query, input_schema, parse
from workers.tool_input import need_json
from workers.vector_store import Point, VectorStore

_LIMIT = 10
_LARGE_BYTES = 64 * 1024  # parsing more than this takes longer than the event loop should wait


class _Collection:
    def __init__(self, section: CollectionSection, config: Config) -> None:
        self.section = section
        self.target = Target(
            kind=Kind.RETRIEVE,
            name=section.name,
            description=f"Vector collection, {section.dimensions} dimensions, cosine similarity: query, upsert, count",
            home_region=config.region_names[0],
            slots=config.retrieve.slots,
            idempotent=True,
            input_schema=input_schema(section.dimensions),
        )


class RetrieveExecutor:
    """The executor for steps of kind retrieve. `embed` serves all collections, so they must name one embed_target."""

    def __init__(self, config: Config, embed: Embed, environ: Mapping[str, str] = os.environ) -> None:
        self._config = config
        self._embed = embed
        self._environ = environ
        self._collections = {section.name: _Collection(section, config) for section in config.retrieve.collections}
        self._store: VectorStore | None = None

    async def start(self) -> None:
        """Opens the store and makes missing collections. Raises ConfigError with everything wrong, Unavailable."""
        section = self._config.retrieve
        problems = []
        if section.api_key_env and section.api_key_env not in self._environ:
            problems.append(f"retrieve.api_key_env: the environment variable {section.api_key_env} is not set")
        names = [collection.name for collection in section.collections]
        problems += [f"retrieve.collections: {name!r} is there more than once" for name in sorted(set(names)) if names.count(name) > 1]
        if len({collection.embed_target for collection in section.collections}) > 1:
            problems.append("retrieve.collections: all collections of a worker must have the same embed_target")
        if problems:
            raise ConfigError("retrieve", problems)
        store = VectorStore(section.url, section.path, self._environ.get(section.api_key_env, ""))
        await store.open()
        try:
            found = [await store.ensure(collection.name, collection.dimensions) for collection in section.collections]
            problems = [f"retrieve.collections: {problem}" for problem in found if problem]
            if problems:
                raise ConfigError("retrieve", problems)
        except BaseException:
            await store.close()
            raise
        self._store = store

    async def close(self) -> None:
        if self._store is not None:
            await self._store.close()
            self._store = None

    def targets(self) -> Sequence[Target]:
        return [collection.target for collection in self._collections.values()]

    def ready(self, target: str) -> bool:
        return self._store is not None and target in self._collections

    async def execute(self, work: Work) -> Payload:
        """Raises InvalidStep, StepFailed, Unavailable."""
        collection = self._collections.get(work.step.target)
        if collection is None:
            raise StepFailed(f"this worker has no collection {work.step.target!r}", code="NOT_FOUND", reason="UNKNOWN_TARGET")
        if self._store is None:
            raise Unavailable("the vector store is closed")
        operation = await _parse(work.step.input, collection.section.dimensions)
        name = collection.section.name
        answer: dict[str, object]
        if operation["op"] == "query":
            vector = (await self._vectors([operation], collection))[0]
            answer = {"hits": await self._store.query(name, vector, operation.get("limit", _LIMIT), operation.get("filter", {}))}
        elif operation["op"] == "upsert":
            new = operation["points"]
            vectors = await self._vectors(new, collection)
            points = [Point(point["id"], vector, point.get("payload", {})) for point, vector in zip(new, vectors, strict=True)]
            await self._store.upsert(name, points)
            answer = {"upserted": len(points)}
        else:
            answer = {"count": await self._store.count(name)}
        return Payload(to_json(answer, inf_nan_mode="null"))

    async def _vectors(self, items: Sequence[Query | NewPoint], collection: _Collection) -> list[list[float]]:
        """The vector of each item: its own, or that of its text."""
        texts = [item["text"] for item in items if "text" in item]
        embedded = iter(await self._embedded(texts, collection.section.dimensions) if texts else ())
        return [next(embedded) if "text" in item else item["vector"] for item in items]

    async def _embedded(self, texts: list[str], dimensions: int) -> list[list[float]]:
        try:
            vectors = await self._embed(texts)
        except Rejected as error:
            # The embedding model is busy: this step can wait in its queue.
            raise Unavailable(error.message, reason=error.reason, retry_after_s=error.retry_after_s) from None
        except (Unavailable, StepFailed):
            raise
        except NearloopError as error:
            raise StepFailed(f"embedding: {error.message}", code=error.code, reason=error.reason) from None
        if len(vectors) != len(texts) or any(len(vector) != dimensions for vector in vectors):
            message = f"the embedding model does not give {dimensions} numbers for each text, as the collection needs"
            raise StepFailed(message, code="FAILED_PRECONDITION", reason="EMBEDDING_INVALID")
        return vectors


async def _parse(payload: Payload, dimensions: int) -> Operation:
    need_json(payload)
    if len(payload.data) > _LARGE_BYTES:
        return await asyncio.to_thread(parse, payload.data, dimensions)
    return parse(payload.data, dimensions)

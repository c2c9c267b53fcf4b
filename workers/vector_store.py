"""Qdrant, embedded or a cluster: one adapter. The only file that imports qdrant_client.

Collections are made with dot product and every vector is brought to length 1 here, which is cosine similarity. The embedded mode
would otherwise normalise all stored vectors again in every query. An existing collection may use either.

The embedded mode computes in Python and blocks. It has a thread of its own, one only, since it is not safe to use from several;
a cluster is asked from the event loop.
"""

import asyncio
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from qdrant_client import AsyncQdrantClient, QdrantClient, models
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from gateway.errors import NearloopError, StepFailed, Unavailable

_ID_NAMESPACE = uuid.UUID("5d7e1ba6-7c7e-5f0b-9d3e-6f8f6f1d6a51")
ID_FIELD = "_id"  # in a point's payload: its id as the caller gave it, when that was text
_TIMEOUT_S = 30
Vectors = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Point:
    """id: a number from 0 to 2**64 - 1, or any text."""

    id: int | str
    vector: Sequence[float]
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Hit:
    """score: cosine similarity, from -1 to 1."""

    id: int | str
    score: float
    payload: dict[str, Any]


class VectorStore:
    """Raises Unavailable when the store cannot be reached, StepFailed (STORE_ERROR) when it refuses."""

    def __init__(self, url: str = "", path: str = "", api_key: str = "") -> None:
        self._url = url
        self._path = path
        self._api_key = api_key
        self._client: Any = None
        self._thread: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Opens the embedded store, or makes the client for the cluster without connecting."""
        if self._url:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a key on plain HTTP: the operator's choice, said once in the docs
                self._client = AsyncQdrantClient(
                    url=self._url, api_key=self._api_key or None, timeout=_TIMEOUT_S, check_compatibility=False
                )
            return
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qdrant")
        try:
            # Opened by the thread that will use it: sqlite insists.
            self._client = await self._in_thread(partial(_open_embedded, self._path))
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    async def close(self) -> None:
        if self._client is None:
            return
        if self._thread is None:
            await self._client.close()
        else:
            await self._in_thread(self._client.close)
            self._thread.shutdown()
        self._client = None

    async def ensure(self, collection: str, dimensions: int) -> str | None:
        """Makes the collection when it is missing. Returns what is wrong with an existing one, as a sentence."""
        if not await self._call("collection_exists", collection):
            params = models.VectorParams(size=dimensions, distance=models.Distance.DOT)
            try:
                await self._call("create_collection", collection, vectors_config=params)
            except StepFailed:
                # Another worker may have made it in between; the check below says whether it is right.
                if not await self._call("collection_exists", collection):
                    raise
        found = (await self._call("get_collection", collection)).config.params.vectors
        if not isinstance(found, models.VectorParams):
            return f"collection {collection!r} has named vectors; one unnamed vector is needed"
        if found.size != dimensions:
            return f"collection {collection!r} has {found.size} dimensions, the configuration says {dimensions}"
        if found.distance not in (models.Distance.DOT, models.Distance.COSINE):
            return f"collection {collection!r} measures {found.distance.value}; Dot or Cosine is needed"
        return None

    async def query(self, collection: str, vector: Sequence[float], limit: int, equal: Mapping[str, Any]) -> list[Hit]:
        """The nearest points, best first, of those whose payload has each field of equal with that value (or one of a list's)."""
        conditions: list[Any] = [models.FieldCondition(key=key, match=_match(value)) for key, value in equal.items()]
        query_filter = models.Filter(must=conditions) if conditions else None
        unit = _unit([vector])[0]
        found = await self._call("query_points", collection, query=unit, limit=limit, query_filter=query_filter)
        return [_hit(point) for point in found.points]

    async def upsert(self, collection: str, points: Sequence[Point]) -> None:
        """Writes the points; one with a known id replaces it. Durable, as far as the store is, when this returns."""
        await self._call("upsert", collection, points=await asyncio.to_thread(_batch, points), wait=True)

    async def delete(self, collection: str, ids: Sequence[int | str]) -> None:
        """Removes the points that are there; durable likewise."""
        await self._call("delete", collection, points_selector=models.PointIdsList(points=[_key(one) for one in ids]), wait=True)

    async def count(self, collection: str) -> int:
        return int((await self._call("count", collection, exact=True)).count)

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        # The two clients have the same methods; one blocks, the other is awaited.
        call = partial(getattr(self._client, method), *args, **kwargs)
        try:
            return await (call() if self._thread is None else self._in_thread(call))
        except UnexpectedResponse as error:
            raise _refused(error.status_code or 500) from None
        except ApiException as error:
            raise Unavailable(f"the vector store does not answer ({type(error).__name__})") from None
        except ValueError as error:  # the embedded mode's way to refuse
            raise StepFailed(f"the vector store refused: {type(error).__name__}", reason="STORE_ERROR") from None


def _open_embedded(path: str) -> QdrantClient:
    # Says in every upsert beyond 20,000 points that a server would be faster.
    warnings.filterwarnings("ignore", message="Local mode is not recommended", category=UserWarning)
    if not path:
        return QdrantClient(location=":memory:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # one that is locked leaves its lock file to the garbage collector
        try:
            return QdrantClient(path=path)
        except (OSError, RuntimeError) as error:  # RuntimeError: another process has it open
            why = str(error).partition("\n")[0]
    raise Unavailable(f"the vector store at {path!r} cannot be opened: {why}")


def _refused(status: int) -> NearloopError:
    message = f"the vector store answered {status}"
    if status in (408, 429) or status >= 500:
        return Unavailable(message)
    return StepFailed(message, code="PERMISSION_DENIED" if status in (401, 403) else "INTERNAL", reason="STORE_ERROR")


def _unit(vectors: Vectors) -> list[list[float]]:
    """Each vector at length 1; one of length 0 stays, and scores 0."""
    matrix = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    units: list[list[float]] = (matrix / np.where(lengths > 0, lengths, 1)).tolist()
    return units


def _key(point_id: int | str) -> int | str:
    """Qdrant takes numbers and UUIDs."""
    return point_id if isinstance(point_id, int) else str(uuid.uuid5(_ID_NAMESPACE, point_id))


def _batch(points: Sequence[Point]) -> models.Batch:
    ids: list[Any] = [_key(point.id) for point in points]
    payloads = [{**point.payload, ID_FIELD: point.id} if isinstance(point.id, str) else dict(point.payload) for point in points]
    return models.Batch(ids=ids, vectors=_unit([point.vector for point in points]), payloads=payloads)


def _match(value: Any) -> models.MatchAny | models.MatchValue:
    return models.MatchAny(any=value) if isinstance(value, list) else models.MatchValue(value=value)


def _hit(point: Any) -> Hit:
    payload = dict(point.payload or {})
    return Hit(payload.pop(ID_FIELD, point.id), point.score, payload)

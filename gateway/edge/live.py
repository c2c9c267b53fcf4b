"""The live catalogue: which targets there are and which workers breathe, from two key-value buckets, kept in memory."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import datetime

from gateway.clock import Clock
from gateway.edge import buckets
from gateway.edge import headers as h
from gateway.edge.catalogue import read_target, read_worker
from gateway.edge.jetstream import JetStream, until_answered
from gateway.subjects import TARGETS_BUCKET, WORKERS_BUCKET
from gateway.types import Target, WorkerInfo

log = logging.getLogger(__name__)


class LiveCatalogue:
    """Follows both buckets by plain subscriptions and loads them at start and after each reconnect."""

    def __init__(self, js: JetStream, clock: Clock, heartbeat_s: float) -> None:
        self._js, self._clock, self._fresh_s = js, clock, 3 * heartbeat_s
        self._targets: dict[str, Target] = {}
        self._workers: dict[str, tuple[WorkerInfo, float]] = {}
        self._live_keys: set[str] | None = None  # told by a subscription while a load is going on: newer than what is loaded
        self._load_lock = asyncio.Lock()
        self._alive: tuple[WorkerInfo, ...] = ()
        self._alive_until_s = 0.0
        self._loading: asyncio.Task[None] | None = None
        js.link.subscribe(f"$KV.{TARGETS_BUCKET}.>", self._on_change)
        js.link.subscribe(f"$KV.{WORKERS_BUCKET}.>", self._on_change)
        js.link.on_reconnect.append(self._reload)

    def targets(self) -> Mapping[str, Target]:
        return self._targets

    def workers(self) -> Sequence[WorkerInfo]:
        now_s = self._clock.now_s()
        if now_s >= self._alive_until_s:
            dead = [key for key, (_, seen_s) in self._workers.items() if seen_s + self._fresh_s <= now_s]
            for key in dead:
                log.warning("worker %s sent no heartbeat for %.0f s", key, self._fresh_s)
                del self._workers[key]
            self._alive = tuple(info for info, _ in self._workers.values())
            self._alive_until_s = min((seen_s for _, seen_s in self._workers.values()), default=now_s) + self._fresh_s
        return self._alive

    def _on_change(self, subject: str, _reply: str, headers: bytes, data: bytes) -> None:
        if self._live_keys is not None:
            self._live_keys.add(subject)
        self._apply(subject, headers, data, 0.0)

    def _apply(self, subject: str, headers: bytes, data: bytes, age_s: float) -> None:
        _, bucket, key = subject.split(".", 2)
        gone = buckets.is_gone(headers)
        try:
            if bucket == WORKERS_BUCKET:
                self._alive_until_s = 0.0
                if gone:
                    self._workers.pop(key, None)
                elif age_s < self._fresh_s:
                    self._workers[key] = (read_worker(data), self._clock.now_s() - age_s)
            elif gone:
                self._targets = {scope: one for scope, one in self._targets.items() if scope != key}
            else:
                target = read_target(data)
                if self._targets.get(target.scope) != target:
                    self._targets = self._targets | {target.scope: target}  # a new one: readers may hold the old
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s is not understood: %s", subject, error)

    async def load(self) -> None:
        """Raises Unavailable."""
        async with self._load_lock:  # a reconnect can ask for another load during the first
            live_keys: set[str] = set()
            self._live_keys = live_keys
            try:
                await self._js.link.barrier()
                for bucket in (TARGETS_BUCKET, WORKERS_BUCKET):
                    await until_answered(f"the contents of {bucket}", self._loader(bucket, live_keys))
            finally:
                self._live_keys = None

    def _loader(self, bucket: str, live_keys: Set[str]) -> Callable[[int], "asyncio.Future[None]"]:
        return lambda _: asyncio.ensure_future(self._load(bucket, live_keys))

    async def _load(self, bucket: str, live_keys: Set[str]) -> None:
        async for message in buckets.entries(self._js, bucket):
            if message.subject not in live_keys:
                stored = h.parse(message.headers)["Nats-Time-Stamp"]
                stored_s = datetime.fromisoformat(stored[:19] + "+00:00").timestamp()
                self._apply(message.subject, message.headers, message.data, max(0.0, self._clock.wall_s() - stored_s - 1.0))

    def _reload(self) -> None:
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._reload_now(), name="load the live catalogue")

    async def _reload_now(self) -> None:
        try:
            await self.load()
        except Exception as error:  # what is known stays; heartbeats go on by subscription
            log.warning("the live catalogue was not loaded again: %s", error)

    async def close(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

"""Following key-value buckets of all regions: what is stored is told by a plain subscription, what was stored before is loaded."""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from gateway.clock import Clock
from gateway.edge import buckets
from gateway.edge import headers as h
from gateway.edge.jetstream import ApiError, JetStream, Message, NoAnswer, until_answered
from gateway.edge.sites import Sites
from gateway.subjects import live

log = logging.getLogger(__name__)

_START_S = 2.0  # that a start waits for servers of other regions
_FIRST_PAUSE_S = 0.5
_LOOK_S = 30.0  # what another region said while it was cut off is found so


class Entry(NamedTuple):
    """data: None for a key that is gone. told: just now, else it was loaded. stored_s: by the clock of the server that stored it, age_s: by
    ours."""

    bucket: str
    key: str
    data: bytes | None
    told: bool
    stored_s: float
    age_s: float


class Follower:
    """Each entry reaches on_entry, none that is older than what was told of its key before it was asked for.

    The buckets of the own servers are loaded at start and after each reconnect; those of others when they answer, and again from time
    to time.
    """

    def __init__(self, sites: Sites, clock: Clock, names: Sequence[str], on_entry: Callable[[Entry], None]) -> None:
        self._sites, self._clock, self._names, self._on_entry = sites, clock, names, on_entry
        self._told: list[set[str]] = []  # for each load that is going on: what was told meanwhile is newer than what is loaded
        self._load_lock = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None
        self._far: list[asyncio.Task[None]] = []
        link = sites.own.link
        for name in names:
            link.subscribe(live(name), self._on_live)
        link.on_reconnect.append(self._reload)

    async def start(self) -> None:
        """Raises Unavailable when the own servers do not answer; for those of other regions it waits a moment only."""
        await self.load()
        first = [asyncio.Event() for _ in self._sites.others]
        for (domain, js), loaded in zip(self._sites.others.items(), first, strict=True):
            self._far.append(asyncio.create_task(self._follow_far(domain, js, loaded), name=f"load the live catalogue of {domain}"))
        try:
            async with asyncio.timeout(_START_S):
                await asyncio.gather(*(loaded.wait() for loaded in first))
        except TimeoutError:
            pass

    async def close(self) -> None:
        tasks = [task for task in (self._loading, *self._far) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_live(self, subject: str, _reply: str, headers: bytes, data: bytes) -> None:
        _, _, bucket, key = subject.split(".", 3)
        try:
            stored_s = _stored_s(headers)
        except (KeyError, ValueError):
            log.warning("%s was not told by a bucket", subject)
            return
        for told in self._told:
            told.add(f"{bucket}.{key}")
        self._on_entry(Entry(bucket, key, None if buckets.is_gone(headers) else data, True, stored_s, 0.0))

    async def load(self) -> None:
        """Of the own servers. Raises Unavailable."""
        async with self._load_lock:  # a reconnect can ask for another load during the first
            await self._sites.own.link.barrier()
            for name in self._names:
                await until_answered(f"the contents of {name}", lambda _, name=name: self._load(self._sites.own, name))  # type: ignore[misc]

    async def _load(self, js: JetStream, bucket: str) -> None:
        told: set[str] = set()
        self._told.append(told)
        try:
            async for message in buckets.entries(js, bucket):
                if message.subject.removeprefix("$KV.") not in told:
                    self._on_entry(self._entry(bucket, message))
        finally:
            self._told = [one for one in self._told if one is not told]  # not by what they hold: empty ones are equal

    def _entry(self, bucket: str, message: Message) -> Entry:
        stored_s = _stored_s(message.headers)
        # A second less: clocks differ a little, and what just lives should not look dead.
        age_s = max(0.0, self._clock.wall_s() - stored_s - 1.0)
        key = message.subject.split(".", 2)[2]
        return Entry(bucket, key, None if buckets.is_gone(message.headers) else message.data, False, stored_s, age_s)

    def _reload(self) -> None:
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._reload_now(), name="load the live catalogue")

    async def _reload_now(self) -> None:
        try:
            await self.load()
        except Exception as error:  # what is known stays; heartbeats go on by subscription
            log.warning("the live catalogue was not loaded again: %s", error)

    async def _follow_far(self, domain: str, js: JetStream, loaded: asyncio.Event) -> None:
        """Tells the log once when a domain stops answering, and when it is back."""
        pause_s, away = _FIRST_PAUSE_S, False
        while True:
            try:
                for name in self._names:
                    await self._load(js, name)
            except (NoAnswer, ApiError) as error:
                if not away:
                    log.warning("the live catalogue of domain %s cannot be read now: %s", domain, error)
                away = True
                wait_s = random.uniform(0.5, 1.0) * pause_s
                pause_s = min(2 * pause_s, _LOOK_S)
            except Exception:
                log.exception("the live catalogue of domain %s cannot be read", domain)
                wait_s = _LOOK_S
            else:
                if away:
                    log.info("the live catalogue of domain %s is read again", domain)
                away, pause_s = False, _FIRST_PAUSE_S
                loaded.set()
                wait_s = random.uniform(0.8, 1.2) * _LOOK_S
            await asyncio.sleep(wait_s)


def _stored_s(headers: bytes) -> float:
    """When the server stored it, seconds since 1970; it writes nanoseconds without trailing zeros, which Python does not read."""
    stored = h.parse(headers)["Nats-Time-Stamp"]
    second, _, fraction = stored.removesuffix("Z").partition(".")
    return datetime.fromisoformat(second + "+00:00").timestamp() + float(f"0.{fraction or 0}")

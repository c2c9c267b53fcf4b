"""The NATS micro protocol, so that `nats service ls`, `info` and `stats` show gateways and workers.

Steps do not come in as micro requests but through JetStream, so nats-py's own service, which counts requests to its subjects,
cannot count them: this answers the protocol's three questions from the process's counters.
https://github.com/nats-io/nats-architecture-and-design ADR-32
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gateway.edge.link import Link, LinkSubscription

_TYPE = "io.nats.micro.v1."


@dataclass(frozen=True, slots=True)
class ServiceEndpoint:
    """An endpoint with its counters; processing_ns is the sum over all requests."""

    name: str
    subject: str
    num_requests: int = 0
    num_errors: int = 0
    processing_ns: int = 0
    last_error: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class ServiceResponder:
    """Answers `$SRV.PING`, `INFO` and `STATS`, each also with `.<name>` and `.<name>.<id>`."""

    def __init__(
        self,
        link: Link,
        *,
        name: str,
        instance_id: str,
        version: str,
        description: str,
        metadata: Mapping[str, str],
        endpoints: Callable[[], Sequence[ServiceEndpoint]],
    ) -> None:
        self._link = link
        self._identity: dict[str, Any] = {"name": name, "id": instance_id, "version": version, "metadata": dict(metadata)}
        self._description = description
        self._endpoints = endpoints
        self._started = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._subscriptions: list[LinkSubscription] = []

    async def start(self) -> None:
        """Answers when this returns."""
        name, instance = self._identity["name"], self._identity["id"]
        for verb, answer in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{name}", f"$SRV.{verb}.{name}.{instance}"):
                self._subscriptions.append(self._link.subscribe(subject, self._handler(answer)))
        await self._link.barrier()

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()

    def _handler(self, answer: Callable[[], dict[str, Any]]) -> Callable[[str, str, bytes, bytes], None]:
        def on_request(_subject: str, reply: str, _headers: bytes, _data: bytes) -> None:
            if reply:
                self._link.send(reply, json.dumps(answer()).encode())

        return on_request

    def _ping(self) -> dict[str, Any]:
        return {**self._identity, "type": f"{_TYPE}ping_response"}

    def _info(self) -> dict[str, Any]:
        endpoints = [{"name": one.name, "subject": one.subject, "queue_group": "", "metadata": {}} for one in self._endpoints()]
        return {**self._identity, "type": f"{_TYPE}info_response", "description": self._description, "endpoints": endpoints}

    def _stats(self) -> dict[str, Any]:
        endpoints = [
            {
                "name": one.name,
                "subject": one.subject,
                "queue_group": "",
                "num_requests": one.num_requests,
                "num_errors": one.num_errors,
                "last_error": one.last_error,
                "processing_time": one.processing_ns,
                "average_processing_time": one.processing_ns // max(1, one.num_requests),
                "data": one.data,
            }
            for one in self._endpoints()
        ]
        return {**self._identity, "type": f"{_TYPE}stats_response", "started": self._started, "endpoints": endpoints}

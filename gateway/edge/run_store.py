"""Runs in NATS: the record and its mark at the origin, the journal where the run is executed.

nl.run.<origin>.<tenant>.<id>.accepted   the record, written once
nl.run.<origin>.<tenant>.<id>.order      its body: program, input and options, until the run has ended
nl.run.<origin>.<tenant>.<id>.open       the mark of a run without a result; its body says where it is placed now
nl.run.<region>.<tenant>.<id>.journal    the journal, each entry written by compare-and-set on the last one
$KV.nl-values.<tenant>.<id>.<hash>       a large value, in the region that executes the run
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from gateway import subjects
from gateway.clock import Clock
from gateway.edge import codec, lookup
from gateway.edge import headers as h
from gateway.edge.dispatch import step_ttl_s
from gateway.edge.jetstream import STREAM_FULL, WRONG_LAST_SEQUENCE, ApiError, JetStream, Message, NoAnswer, until_answered
from gateway.edge.pages import read_subjects
from gateway.errors import Rejected, Unavailable
from gateway.ports import LeaseLost
from gateway.run_types import RUN_TARGET, OpenRun, RunRecord
from gateway.types import Kind, Lane, Payload, Step

_LOOK_S = 2.0  # for questions about a region that may be away
_H_RECORD = "Nl-Record"  # what a record says beside its body, JSON
_GRACE_S = 3600.0  # a mark outlives the deadline of its run by so much, for keepers that were away


class NatsRunStore:
    """A `ports.RunStore`. js_of(region) reaches the streams of a region."""

    def __init__(self, js_of: Callable[[str], JetStream], region: str, clock: Clock) -> None:
        self._js_of, self._region, self._clock = js_of, region, clock

    # ---- records and marks, at the origin -----------------------------------------------------------------------------------------

    async def accept(self, record: RunRecord) -> tuple[RunRecord, bool]:
        """Raises Unavailable, Rejected (QUEUE_FULL), InvalidStep (too large)."""
        origin = subjects.job_region(record.id)
        js = self._js_of(origin)
        left_s = max(0.0, record.deadline_s - self._clock.wall_s())
        call = js.new_call()
        accepted = subjects.run_accepted(origin, record.tenant, record.id)
        first = f"{codec.H_EXPECTED_SUBJECT_SEQUENCE}: 0\r\n"
        headers = h.block(
            f"{first}{codec.H_TTL}: {math.ceil(left_s + record.keep_s)}s\r\n{codec.H_CALL}: {call}\r\n"
            f"{_H_RECORD}: {h.escape(_head(record))}\r\n"
        )
        mark = h.block(f"{first}{codec.H_TTL}: {math.ceil(left_s + _GRACE_S)}s\r\n")

        async def attempt(_: int) -> tuple[RunRecord, bool]:
            """All leave at once, the record last: what is there without it a keeper takes away, a record without a mark never shows."""
            *others, stored = await asyncio.gather(
                js.publish(subjects.run_order(origin, record.tenant, record.id), record.body, mark),
                js.publish(subjects.run_open(origin, record.tenant, record.id), _mark(record.region, ()), mark),
                js.publish(accepted, b"", headers),
                return_exceptions=True,
            )
            for error in (*others, stored):
                if error is None or (isinstance(error, ApiError) and error.err_code in WRONG_LAST_SEQUENCE):
                    continue
                if isinstance(error, ApiError) and error.err_code == STREAM_FULL:
                    message = f"region {origin} takes no more runs: its stream {subjects.RUNS_STREAM} is full"
                    raise Rejected(message, reason="QUEUE_FULL", scope=origin, policy="queue")
                raise error
            if stored is None:
                return record, True
            found = await js.last(subjects.RUNS_STREAM, accepted)
            if found is None:
                raise NoAnswer("the record changes")
            # After an unknown outcome it may be the one that this call wrote.
            return _record(found), h.parse(found.headers).get(codec.H_CALL) == call

        return await until_answered("a run", attempt)

    async def find(self, tenant: str, run_id: str) -> RunRecord | None:
        found = await self._last(run_id, subjects.run_accepted(subjects.job_region(run_id), tenant, run_id))
        return None if found is None else _record(found)

    async def body(self, record: RunRecord) -> RunRecord | None:
        found = await self._last(record.id, subjects.run_order(subjects.job_region(record.id), record.tenant, record.id))
        return None if found is None else replace(record, body=found.data)

    async def mark(self, tenant: str, run_id: str) -> OpenRun | None:
        found = await self._last(run_id, subjects.run_open(subjects.job_region(run_id), tenant, run_id))
        return None if found is None else _open(found)

    async def _last(self, run_id: str, subject: str) -> Message | None:
        js = self._js_of(subjects.job_region(run_id))
        return await until_answered("a run", lambda _: js.last(subjects.RUNS_STREAM, subject))

    async def open_runs(self, origin: str) -> Sequence[OpenRun]:
        pattern = subjects.run_open(origin, "*", "*")
        found = await until_answered("the open runs", lambda _: read_subjects(self._js_of(origin), subjects.RUNS_STREAM, pattern))
        latest = {message.subject: message for message in found}
        return [_open(message) for message in latest.values()]

    async def move(self, run: OpenRun, region: str) -> OpenRun | None:
        origin = subjects.job_region(run.id)
        left = tuple(dict.fromkeys((*run.left, run.region)))
        lines = h.block(f"{codec.H_EXPECTED_SUBJECT_SEQUENCE}: {run.sequence}\r\n")
        try:
            async with asyncio.timeout(_LOOK_S):
                subject = subjects.run_open(origin, run.tenant, run.id)
                await self._js_of(origin).publish(subject, _mark(region, left), lines)
        except ApiError as error:
            if error.err_code in WRONG_LAST_SEQUENCE:
                return None
            raise Unavailable(f"NATS refused to move a run: {error}") from None
        except (NoAnswer, TimeoutError):
            raise Unavailable("NATS did not confirm that a run was moved") from None
        return await self.mark(run.tenant, run.id)

    async def close_run(self, tenant: str, run_id: str) -> None:
        origin = subjects.job_region(run_id)
        js = self._js_of(origin)
        for subject in (subjects.run_order(origin, tenant, run_id), subjects.run_open(origin, tenant, run_id)):
            await until_answered("the end of a run", partial(_purge, js, subject))

    # ---- tokens, where the run is placed ------------------------------------------------------------------------------------------

    async def send(self, record: RunRecord, region: str) -> None:
        """Raises Rejected (QUEUE_FULL), Unavailable."""
        step = token(record)
        extra = f"{subjects.H_MSG_ID}: {record.id}\r\n{codec.H_TTL}: {step_ttl_s(step, self._clock.wall_s())}s\r\n"
        subject = subjects.step(region, step.kind, step.target, step.lane, step.id)
        headers = codec.step_headers(step, extra=extra)
        try:
            await self._js_of(region).publish(subject, step.input.data, headers)
        except NoAnswer as error:
            raise Unavailable(f"region {region} did not confirm a run: {error}") from None
        except ApiError as error:
            if error.err_code == STREAM_FULL:
                raise Rejected(f"the queue of region {region} is full", reason="QUEUE_FULL", scope=region, policy="queue") from None
            raise Unavailable(f"NATS refused a run: {error}") from None

    async def waits(self, record: RunRecord, region: str) -> bool:
        try:
            async with asyncio.timeout(_LOOK_S):
                return await lookup.is_queued(self._js_of(region), token(record), region)
        except TimeoutError:
            raise Unavailable(f"region {region} does not answer") from None

    async def withdraw(self, record: RunRecord, region: str) -> None:
        js = self._js_of(region)
        js.link.send(subjects.cancel(record.tenant, record.id))
        try:
            async with asyncio.timeout(_LOOK_S):
                await lookup.withdraw(js, token(record), region)
        except TimeoutError:
            raise Unavailable(f"region {region} does not answer") from None

    # ---- journals and values, where the run is executed ---------------------------------------------------------------------------

    def journal(self, region: str, tenant: str, run_id: str, keep_s: float) -> "NatsRunJournal":
        return NatsRunJournal(self._js_of(region), subjects.run_journal(region, tenant, run_id), keep_s)

    async def put_value(self, tenant: str, run_id: str, data: bytes, keep_s: float) -> str:
        name = hashlib.sha256(data).hexdigest()
        headers = h.block(f"{codec.H_TTL}: {max(1, math.ceil(keep_s))}s\r\n")
        js, subject = self._js_of(self._region), _value(tenant, run_id, name)
        await until_answered("a value", lambda _: js.publish(subject, data, headers))
        return f"{self._region}.{name}"

    async def value(self, tenant: str, run_id: str, name: str, region: str) -> bytes | None:
        holder, _, digest = name.rpartition(".")
        js, stream = self._js_of(holder or region), f"KV_{subjects.VALUES_BUCKET}"
        found = await until_answered("a value", lambda _: js.last(stream, _value(tenant, run_id, digest)))
        return None if found is None else found.data


class NatsRunJournal:
    """A `ports.RunJournal`."""

    def __init__(self, js: JetStream, subject: str, keep_s: float) -> None:
        self._js, self._subject, self._keep_s = js, subject, keep_s
        self._sequence = 0  # of the last entry that this runner knows of
        self._unsure: tuple[bytes, str] | None = None  # an entry that may have been stored, and the call that wrote it

    async def read(self) -> Sequence[bytes]:
        async def attempt(_: int) -> list[Message]:
            last = await self._js.last(subjects.RUNS_STREAM, self._subject)
            if last is None:
                return []
            found = await read_subjects(self._js, subjects.RUNS_STREAM, self._subject)
            if not found or found[-1].sequence < last.sequence:
                raise NoAnswer("a replica lags behind")
            return found

        found = await until_answered("a run's journal", attempt)
        self._sequence = found[-1].sequence if found else 0
        return [message.data for message in found]

    async def append(self, entry: bytes) -> None:
        call = self._unsure[1] if self._unsure is not None and self._unsure[0] == entry else self._js.new_call()
        unsure, self._unsure = self._unsure, (entry, call)
        headers = h.block(
            f"{codec.H_EXPECTED_SUBJECT_SEQUENCE}: {self._sequence}\r\n{codec.H_TTL}: {max(1, math.ceil(self._keep_s))}s\r\n"
            f"{codec.H_CALL}: {call}\r\n"
        )
        try:
            self._sequence = await self._js.store(self._subject, entry, headers)
        except NoAnswer as error:
            raise Unavailable(f"NATS did not confirm an entry of a run's journal: {error}") from None
        except ApiError as error:
            if error.err_code not in WRONG_LAST_SEQUENCE:
                raise Unavailable(f"NATS refused an entry of a run's journal: {error}") from None
            if unsure is None or unsure[1] != call or not await self._is_ours(call):
                raise LeaseLost from None
        self._unsure = None

    async def _is_ours(self, call: str) -> bool:
        """Was it stored by the try before, whose answer was lost?"""
        last = await until_answered("a run's journal", lambda _: self._js.last(subjects.RUNS_STREAM, self._subject))
        if last is None or h.parse(last.headers).get(codec.H_CALL) != call:
            return False
        self._sequence = last.sequence
        return True


def token(record: RunRecord) -> Step:
    """The step that a runner gets for the run."""
    return Step(
        id=record.id,
        tenant=record.tenant,
        kind=Kind.RUN,
        target=RUN_TARGET,
        input=Payload(record.body),
        deadline_s=record.deadline_s,
        lane=record.lane,
        run=record.id,
        traceparent=record.traceparent,
        tracestate=record.tracestate,
    )


def _value(tenant: str, run_id: str, name: str) -> str:
    return f"$KV.{subjects.VALUES_BUCKET}.{tenant}.{run_id}.{name}"


def _mark(region: str, left: tuple[str, ...]) -> bytes:
    return json.dumps({"region": region, "left": left}).encode()


def _open(message: Message) -> OpenRun:
    _, _, _, tenant, run_id, _ = message.subject.split(".")
    found = json.loads(message.data)
    return OpenRun(run_id, tenant, found["region"], tuple(found["left"]), message.sequence)


async def _purge(js: JetStream, subject: str, _: int) -> None:
    await js.api(f"STREAM.PURGE.{subjects.RUNS_STREAM}", {"filter": subject})


_HEAD = ("deadline_s", "created_s", "region", "program", "digest", "may_move", "keep_s", "traceparent", "tracestate")


def _head(record: RunRecord) -> str:
    return json.dumps({"lane": record.lane.value, **{name: getattr(record, name) for name in _HEAD}})


def _record(message: Message) -> RunRecord:
    _, _, _, tenant, run_id, _ = message.subject.split(".")
    head = json.loads(h.unescape(h.parse(message.headers)[_H_RECORD]))
    return RunRecord(id=run_id, tenant=tenant, lane=Lane(head.pop("lane")), **head)

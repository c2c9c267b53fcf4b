"""`submit`: a job's record and its step are stored together in one atomic batch, or not at all."""

import asyncio
import math
import random
import secrets

from gateway import subjects
from gateway.clock import Clock
from gateway.edge import codec
from gateway.edge import headers as h
from gateway.edge.dispatch import step_ttl_s
from gateway.edge.jetstream import STREAM_FULL, WRONG_LAST_SEQUENCE, ApiError, Message, NoAnswer, until_answered
from gateway.edge.sites import Sites
from gateway.errors import Rejected, Unavailable
from gateway.types import Job

# The server takes 50 open batches a stream, from all gateways together.
_BATCHES_AT_ONCE = 32
_TOO_MANY_BATCHES = frozenset({10210, 10176, 10211})  # too many in flight; its rest is then an incomplete batch
_BUSY_TRIES = 50


class JobStore:
    """Writes and reads job records, which live in the region's stream next to the queue; the input is in the queued step alone."""

    def __init__(self, sites: Sites, clock: Clock, job_keep_s: float) -> None:
        self._sites, self._clock, self._keep_s = sites, clock, job_keep_s
        self._slots: dict[str, asyncio.Semaphore] = {}  # by region: one that does not answer holds up no other
        self._random = random.Random()

    async def submit(self, job: Job) -> tuple[Job, bool]:
        """Raises Rejected (QUEUE_FULL), InvalidStep (too large), Unavailable (outcome unknown: ask again with the same id)."""
        call = self._sites.own.new_call()
        async with self._slots.setdefault(job.region, asyncio.Semaphore(_BATCHES_AT_ONCE)):
            return await until_answered("a job", lambda _: self._submit(job, call))

    async def _submit(self, job: Job, call: str) -> tuple[Job, bool]:
        for _ in range(_BUSY_TRIES):
            try:
                await self._store(job, call)
                return job.record(), True
            except ApiError as error:
                if error.err_code in WRONG_LAST_SEQUENCE:
                    found = await self._find(job.region, job.step.tenant, job.step.id)
                    if found is not None:
                        # After an unknown outcome the record may be the one that this call wrote.
                        return _job(found), h.parse(found.headers).get(codec.H_CALL) == call
                elif error.err_code == STREAM_FULL:
                    raise Rejected(
                        f"the queue of region {job.region} is full", reason="QUEUE_FULL", scope=job.region, policy="queue"
                    ) from None
                elif error.err_code not in _TOO_MANY_BATCHES:
                    raise Unavailable(f"NATS refused the job: {error}") from None
            await asyncio.sleep(self._random.uniform(0.002, 0.02))
        raise NoAnswer("too many batches are open")

    async def _store(self, job: Job, call: str) -> None:
        """Both messages leave in one write. A new batch id each time, since a batch cannot be continued."""
        step, js, now_s = job.step, self._sites.js_of(job.region), self._clock.wall_s()
        batch = f"Nats-Batch-Id: {secrets.token_hex(8)}\r\nNats-Batch-Sequence: "
        record_ttl_s = max(1, math.ceil(step.deadline_s - now_s + self._keep_s))
        record = codec.job_headers(job, extra=f"{batch}1\r\n{codec.H_EXPECTED_SUBJECT_SEQUENCE}: 0\r\n{codec.H_TTL}: {record_ttl_s}s\r\n")
        token = codec.step_headers(step, extra=f"{batch}2\r\nNats-Batch-Commit: 1\r\n{codec.H_TTL}: {step_ttl_s(step, now_s)}s\r\n")
        if not js.link.send(subjects.job(job.region, step.tenant, step.id), b"", record):
            raise NoAnswer("the send buffer is full")
        subject = subjects.step(job.region, step.kind, step.target, step.lane, step.id)
        await js.publish(subject, step.input.data, token)

    async def read(self, region: str, tenant: str, job_id: str) -> Job | None:
        """From the stream's leader. Raises ApiError, NoAnswer."""
        found = await self._find(region, tenant, job_id)
        return None if found is None else _job(found)

    async def _find(self, region: str, tenant: str, job_id: str) -> Message | None:
        return await self._sites.js_of(region).last(subjects.steps_stream(region), subjects.job(region, tenant, job_id))


def _job(found: Message) -> Job:
    return codec.read_job(found.subject, found.headers, found.data)

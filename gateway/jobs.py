"""Durably stored steps: stored once for each idempotency key, ended exactly once, found again by every gateway."""

import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from gateway import subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.core import outcome
from gateway.errors import AlreadyExists, NotFound
from gateway.feed import StepFeed
from gateway.ports import GatewayBus
from gateway.types import JSON, Completed, Job, JobState, JobStatus, Kind, Status, Step, StepEvent, StepResult, Target


class Jobs:
    def __init__(self, config: Config, bus: GatewayBus, clock: Clock, find_target: Callable[[Kind, str], Target | None]) -> None:
        self._config = config
        self._bus = bus
        self._clock = clock
        self._find_target = find_target

    async def store(self, step: Step) -> tuple[Job, bool]:
        """Stores the step in its target's home region: there every gateway finds it again by its key. Raises AlreadyExists."""
        target = self._find_target(step.kind, step.target)
        region = target.home_region if target else self._config.gateway.region
        key = step.idempotency_key or secrets.token_hex(16)
        step = replace(step, id=subjects.job_id(region, step.tenant, step.kind, step.target, key))
        job = Job(step, region, self._clock.wall_s(), _digest(step))
        stored, created = await self._bus.submit(job)
        if stored.digest != job.digest:
            raise AlreadyExists(f"step.idempotency_key: was used before for another input of {step.kind.value} {step.target}")
        return stored, created

    async def status(self, job: Job) -> JobStatus:
        step = job.step
        result = await self.result(job)
        if result:
            return JobStatus(job, outcome.job_state(result), result)
        running = await self._bus.replay(step.tenant, step.id, 0, 0)
        return JobStatus(job, JobState.RUNNING if running else JobState.QUEUED)

    async def find(self, tenant: str, job_id: str) -> Job:
        """Raises NotFound."""
        known = subjects.is_id(job_id) and subjects.job_region(job_id) in self._config.region_names
        job = await self._bus.job(tenant, job_id) if known else None
        if job is None:
            kept = f"jobs are kept for {self._config.nats.job_keep_s:g} s after their deadline"
            raise NotFound(f"job_id: this tenant has no job {job_id!r}; {kept}", reason="JOB_NOT_FOUND")
        return job

    async def watch(self, job: Job, attempt: int, after_sequence: int) -> AsyncGenerator[StepEvent | Completed, None]:
        """Events, then the result. Raises the error that the result stands for."""
        feed = self.feed(job, attempt, after_sequence)
        async with feed, aclosing(feed.follow(float("inf"))) as items:
            async for item in items:
                if isinstance(item, StepEvent):
                    yield item
                    continue
                error = outcome.failure(item)
                if error:
                    raise error
                yield outcome.completed(item, 0.0, (item.queue_us + item.service_us) / 1e6)

    async def cancel(self, job: Job) -> None:
        """Commits the cancelled result first, so that exactly one of it and a worker's result stands."""
        step = job.step
        result = StepResult(
            step.id, step.tenant, Status.CANCELLED, region=job.region, code="CANCELLED", reason="CANCELLED", message="cancelled by request"
        )
        if await self._bus.commit(result, self._keep_s(job)):
            await self._bus.withdraw(step, job.region)

    def feed(self, job: Job, attempt: int = 0, after_sequence: int = 0) -> StepFeed:
        return StepFeed(
            self._bus,
            self._clock,
            job.step.tenant,
            job.step.id,
            attempt=attempt,
            after_sequence=after_sequence,
            find_result=lambda: self.result(job),
        )

    async def result(self, job: Job) -> StepResult | None:
        """The job's result. One that nobody ended until its deadline and a moment more is ended here."""
        step = job.step
        found = await self._bus.result(step.tenant, step.id)
        if found or self._clock.wall_s() < step.deadline_s + self._config.nats.ack_wait_s:
            return found
        expired = StepResult(
            step.id,
            step.tenant,
            Status.EXPIRED,
            region=job.region,
            code="DEADLINE_EXCEEDED",
            reason="DEADLINE_EXCEEDED",
            message="the deadline passed before a worker was done with the job",
        )
        await self._bus.commit(expired, self._keep_s(job))
        await self._bus.withdraw(step, job.region)
        return await self._bus.result(step.tenant, step.id)

    def _keep_s(self, job: Job) -> float:
        """Longer than the record: a job that can still be found must not look as if it had no result."""
        return self._config.nats.job_keep_s + max(0.0, job.step.deadline_s - self._clock.wall_s()) + 60


def _digest(step: Step) -> str:
    """Tells two uses of one key apart. JSON is compared by what it says, not by its spaces and the order of its keys."""
    data = step.input.data
    if step.input.content_type == JSON:
        data = json.dumps(json.loads(data), sort_keys=True).encode()
    parts = (step.kind.value.encode(), step.target.encode(), step.input.content_type.encode(), data)
    return hashlib.sha256(b"\x00".join(parts)).hexdigest()

"""An open-loop load generator, a process of its own: calls leave at times that were drawn beforehand, whatever happened to the ones before.

Reads one JSON job a line from stdin and answers each with one line. A job has `address`, `seconds`, `warmup_s` and `flows`, each with a
rate: {"name", "rate_per_s", "key" (API key), "request" (base64), "timeout_s"}. Latency counts from the intended time, so a generator
that is late makes the numbers worse and never better; how late it was is reported as well. With `window_s` it also tells what happened by
window; with `closed` it keeps so many calls of the first flow in flight instead.
"""

import asyncio
import base64
import gc
import json
import os
import random
import sys
from dataclasses import dataclass, field
from typing import Any

import grpc
import uvloop
from google.rpc import error_details_pb2, status_pb2

METHOD = "/nearloop.v1.Gateway/Execute"
CHANNELS = 4
DETAILS_KEY = "grpc-status-details-bin"


@dataclass
class Outcomes:
    """Calls of one flow whose intended time was measured: (intended time, latency) in seconds, by how they ended."""

    ok: list[tuple[float, float]] = field(default_factory=list)
    rejected: list[tuple[float, float]] = field(default_factory=list)
    expired: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    hints: int = 0


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def arrivals(rate_per_s: float, seconds: float, random_source: random.Random) -> list[float]:
    """A Poisson process."""
    times, now_s = [], random_source.expovariate(rate_per_s)
    while now_s < seconds:
        times.append(now_s)
        now_s += random_source.expovariate(rate_per_s)
    return times


class Run:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.calls = []
        self.channels = [grpc.aio.insecure_channel(job["address"], options=options) for _ in range(CHANNELS)]
        for channel in self.channels:
            self.calls.append(channel.unary_unary(METHOD))
        self.outcomes = {flow["name"]: Outcomes() for flow in job["flows"]}
        self.late: list[float] = []
        self.completed: list[float] = []  # when a call ended well, measured or not

    async def play(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(channel.channel_ready() for channel in self.channels))
        source = random.Random(self.job.get("seed", 1))
        total_s = self.job["warmup_s"] + self.job["seconds"]
        flows = [flow | {"bytes": base64.b64decode(flow["request"])} for flow in self.job["flows"]]
        plan = (
            []
            if self.job.get("closed")
            else sorted((at_s, index) for index, flow in enumerate(flows) for at_s in arrivals(flow["rate_per_s"], total_s, source))
        )
        gc.collect()
        gc.disable()
        self.start = loop.time() + 0.05
        if in_flight := self.job.get("closed"):
            await asyncio.gather(*(self.loop(flows[0], total_s, number) for number in range(in_flight)))
        pending = set()
        for number, (at_s, index) in enumerate(plan):
            wait_s = self.start + at_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif number % 16 == 0:
                await asyncio.sleep(0)  # late: let answers in
            if at_s >= self.job["warmup_s"]:
                self.late.append(max(0.0, -wait_s))
            task = loop.create_task(self.call(flows[index], at_s, number))
            pending.add(task)
            task.add_done_callback(pending.discard)
        if pending:
            await asyncio.wait(pending)
        gc.enable()
        for channel in self.channels:
            await channel.close()
        return self.summary()

    async def loop(self, flow: dict[str, Any], total_s: float, number: int) -> None:
        """The next call leaves when the one before has ended: for measuring a capacity."""
        loop = asyncio.get_running_loop()
        while (at_s := loop.time() - self.start) < total_s:
            await self.call(flow, at_s, number)

    async def call(self, flow: dict[str, Any], at_s: float, number: int) -> None:
        loop = asyncio.get_running_loop()
        metadata = (("x-api-key", flow["key"]),)
        outcome = self.outcomes[flow["name"]]
        measured = at_s >= self.job["warmup_s"]
        try:
            await self.calls[number % CHANNELS](flow["bytes"], timeout=flow["timeout_s"], metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if not measured:
                return
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                outcome.rejected.append((at_s, loop.time() - self.start - at_s))
                self.explain(outcome, error)
            elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                outcome.expired += 1
            else:
                text = f"{error.code().name}: {error.details()}"
                outcome.failed[text] = outcome.failed.get(text, 0) + 1
            return
        ended_s = loop.time() - self.start
        self.completed.append(ended_s)
        if measured:
            outcome.ok.append((at_s, ended_s - at_s))

    def explain(self, outcome: Outcomes, error: grpc.aio.AioRpcError) -> None:
        packed = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), b"")
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        for detail in status_pb2.Status.FromString(packed).details:
            if detail.Unpack(info):
                outcome.reasons[info.reason] = outcome.reasons.get(info.reason, 0) + 1
            elif detail.Unpack(retry):
                outcome.hints += 1

    def summary(self) -> dict[str, Any]:
        begin_s, seconds = self.job["warmup_s"], self.job["seconds"]
        flows = {}
        for name, outcome in self.outcomes.items():
            ok, rejected = [latency for _, latency in outcome.ok], [latency for _, latency in outcome.rejected]
            flows[name] = {
                "sent": len(ok) + len(rejected) + outcome.expired + sum(outcome.failed.values()),
                "ok": len(ok),
                "mean_ms": 1000 * sum(ok) / max(1, len(ok)),
                "p50_ms": 1000 * percentile(ok, 0.5),
                "p99_ms": 1000 * percentile(ok, 0.99),
                "rejected": len(rejected),
                "reject_p50_ms": 1000 * percentile(rejected, 0.5),
                "reject_p99_ms": 1000 * percentile(rejected, 0.99),
                "expired": outcome.expired,
                "failed": outcome.failed,
                "reasons": outcome.reasons,
                "hints": outcome.hints,
            }
        answer: dict[str, Any] = {
            "flows": flows,
            # What ended in the measured time, not what was sent in it: otherwise a growing queue would look like goodput.
            "goodput_per_s": sum(begin_s <= ended_s < begin_s + seconds for ended_s in self.completed) / seconds,
            "late_p99_ms": 1000 * percentile(self.late, 0.99),
        }
        if window_s := self.job.get("window_s"):
            answer["windows"] = self.windows(window_s)
        return answer

    def windows(self, window_s: float) -> list[dict[str, float]]:
        """By time of ending: completions a second, and the latencies of those calls."""
        pairs = sorted((at_s + latency, latency) for outcome in self.outcomes.values() for at_s, latency in outcome.ok)
        found = []
        for number in range(int(self.job["seconds"] / window_s)):
            from_s = self.job["warmup_s"] + number * window_s
            latencies = [latency for ended_s, latency in pairs if from_s <= ended_s < from_s + window_s]
            found.append(
                {
                    "at_s": number * window_s,
                    "per_s": len(latencies) / window_s,
                    "p50_ms": 1000 * percentile(latencies, 0.5),
                    "p99_ms": 1000 * percentile(latencies, 0.99),
                }
            )
        return found


async def main() -> None:
    if core := os.environ.get("NEARLOOP_BENCH_CORE"):
        os.sched_setaffinity(0, {int(core)})
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            answer = await Run(json.loads(line)).play()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(main())

"""The clients of the soak, a process of its own: reads one JSON job from stdin, prints a JSON line every `print_s` and one at the end.

Sessions are spoken by hand, so that the client can count what a client library would hide: each tag's answers, credits against the window,
and what happens to a step that is sent without a credit.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import grpc
import uvloop

from nearloop.v1 import gateway_pb2 as pb
from nearloop.v1.gateway_pb2_grpc import GatewayStub

LANES = (pb.LANE_INTERACTIVE, pb.LANE_STANDARD, pb.LANE_BATCH)  # a queue of its own each
OVERDRAW, OVERDRAW_EVERY_S = 3, 5.0
STALLED_SIZE = 16_384  # answers of a stalled reader are large, so that they do not all fit between gateway and client
READ_BETWEEN_STALLS_S = 60.0
OPEN_WITHIN_S = 5.0
FINISH_WITHIN_S = 180.0


class Tally:
    """Over all sessions."""

    def __init__(self) -> None:
        self.taken = self.answered = self.done = 0  # steps that the gateway owes an answer, that it gave one, that succeeded
        self.twice = self.unknown = self.wrong = self.violations = self.told = self.stalls = 0
        self.failures: Counter[str] = Counter()
        self.added_ms: list[float] = []  # what came on top of the tool's sleep, of readers that do not stall
        self.ended: Counter[str] = Counter()
        self.lost = 0

    def line(self) -> dict[str, Any]:
        return {
            "in_flight": self.taken - self.answered,
            "taken": self.taken,
            "answered": self.answered,
            "done": self.done,
            "violations": self.violations,
            "told": self.told,
            "twice": self.twice,
            "unknown": self.unknown,
            "wrong": self.wrong,
            "stalls": self.stalls,
        }


class Client:
    """One session. role is "", "stalled" or "greedy"."""

    def __init__(self, job: dict[str, Any], tally: Tally, number: int, role: str) -> None:
        self.job, self.tally, self.role = job, tally, role
        self.random = random.Random(number)
        self.credits = self.sent = self.answered = self.tag = 0
        self.open: dict[int, tuple[float, float]] = {}  # tag -> when it was sent, how long the tool sleeps
        self.beyond: set[int] = set()  # of them, those sent beyond the credits that the client knew of
        self.closed: set[int] = set()
        self.changed = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.stopping = False

    async def run(self, end_s: float) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.random.random() * OPEN_WITHIN_S)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self.job["address"], options=options) as channel:
            self.call = GatewayStub(channel).Session()
            reader = loop.create_task(self.read())
            others = [loop.create_task(self.send())]
            if self.role == "stalled":
                others.append(loop.create_task(self.stall(end_s)))
            try:
                await asyncio.wait([reader], timeout=max(0.0, end_s - loop.time()))
                self.stopping = True
                self.reading.set()
                self.changed.set()
                await asyncio.wait([reader], timeout=FINISH_WITHIN_S)
            finally:
                for task in (reader, *others):
                    task.cancel()
                outcomes = await asyncio.gather(reader, *others, return_exceptions=True)
                self.call.cancel()
        errors = [repr(one) for one in outcomes if isinstance(one, Exception)]
        self.tally.ended[errors[0][:200] if errors else "cut off" if reader.cancelled() else str(await self.call.code())] += 1
        self.tally.lost += len(self.open)

    async def send(self) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time() + OVERDRAW_EVERY_S
        while not self.stopping:
            most = self.job["in_flight"] if self.role != "greedy" else 1_000_000
            while self.sent < self.credits and self.sent - self.answered < most:
                await self.step(loop.time())
            if self.role == "greedy" and self.credits and self.sent >= self.credits and loop.time() > next_s:
                next_s = loop.time() + OVERDRAW_EVERY_S
                for _ in range(OVERDRAW):
                    self.beyond.add(self.tag + 1)
                    await self.step(loop.time())
            self.changed.clear()
            await self.changed.wait()
        await self.call.done_writing()

    async def step(self, now_s: float) -> None:
        self.tag += 1
        self.sent += 1
        self.tally.taken += 1
        seconds = self.random.uniform(self.job["least_s"], self.job["most_s"])
        size = STALLED_SIZE if self.role == "stalled" else 0
        self.open[self.tag] = (now_s, seconds)
        content = pb.Content(
            content_type="application/json", data=json.dumps({"number": self.tag, "seconds": seconds, "size": size}).encode()
        )
        step = pb.Step(kind=pb.KIND_TOOL, target="linger", lane=LANES[self.tag % 3], input=pb.Payload(content=content))
        await self.call.write(pb.SessionRequest(step=pb.SessionStep(tag=self.tag, step=step)))

    async def stall(self, end_s: float) -> None:
        """Stops to read for a while, again and again; the first time somewhere in the first third."""
        loop, stall_s = asyncio.get_running_loop(), self.job["stall_s"]
        await asyncio.sleep(10 + self.random.random() * (end_s - loop.time()) / 3)
        while loop.time() + stall_s < end_s:
            self.tally.stalls += 1
            self.reading.clear()
            await asyncio.sleep(stall_s)
            self.reading.set()
            await asyncio.sleep(READ_BETWEEN_STALLS_S)

    async def read(self) -> None:
        while True:
            await self.reading.wait()
            response = await self.call.read()
            if response is grpc.aio.EOF:
                return
            self.take(response)
            self.changed.set()

    def take(self, response: pb.SessionResponse) -> None:
        which = response.WhichOneof("value")
        if which == "result":
            self.answer(response.result.tag, json.loads(response.result.result.output.content.data)["number"])
        elif which == "failure":
            self.fail(response.failure.tag, response.failure.failure.reason)
        if response.credits:
            # More than the window beyond what was answered, or less than before: the gateway broke its own rule.
            late = response.credits > self.answered + self.job["window"]
            self.tally.violations += response.credits <= self.credits or late
            self.credits = max(self.credits, response.credits)

    def fail(self, tag: int, reason: str) -> None:
        if reason != "CREDITS_EXCEEDED":
            self.tally.failures[reason] += 1
            self.answer(tag, tag)
            self.tally.done -= 1
        elif tag in self.beyond:  # told so, and not executed: it took no credit
            self.beyond.discard(tag)
            self.open.pop(tag, None)
            self.closed.add(tag)
            self.sent -= 1
            self.tally.taken -= 1
            self.tally.told += 1
        else:
            self.tally.violations += 1  # a step that had a credit was refused

    def answer(self, tag: int, number: int) -> None:
        if (began := self.open.pop(tag, None)) is None:
            self.tally.twice += tag in self.closed
            self.tally.unknown += tag not in self.closed
            return
        self.closed.add(tag)
        if len(self.closed) > 5000:
            self.closed = {one for one in self.closed if one > tag - 2000}
        self.beyond.discard(tag)
        self.answered += 1
        self.tally.answered += 1
        self.tally.done += 1
        self.tally.wrong += number != tag
        if self.role != "stalled":
            self.tally.added_ms.append(1000 * (asyncio.get_running_loop().time() - began[0] - began[1]))


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


async def main() -> None:
    job = json.loads(await asyncio.to_thread(sys.stdin.readline))
    tally = Tally()
    roles = {"stalled": job["stalled"], "greedy": job["greedy"]}
    names = [name for name, count in roles.items() for _ in range(count)]
    names += [""] * (job["sessions"] - len(names))
    end_s = asyncio.get_running_loop().time() + job["seconds"]
    running = asyncio.gather(*(Client(job, tally, number, name).run(end_s) for number, name in enumerate(names)))
    while not (await asyncio.wait([running], timeout=job["print_s"]))[0]:
        print(json.dumps(tally.line()), flush=True)
    await running
    end = {
        "end": True,
        "lost": tally.lost,
        "ended": tally.ended,
        "failures": tally.failures,
        "p50_ms": percentile(tally.added_ms, 0.5),
        "p99_ms": percentile(tally.added_ms, 0.99),
    }
    print(json.dumps(tally.line() | end), flush=True)


if __name__ == "__main__":
    uvloop.run(main())

"""How much memory a step in flight costs the gateway: thousands of calls are held open, and its unique set size is read.

Before that the same gateway serves a load for a while over the same connections, so that what first steps allocate is not counted
(gRPC also learns on each connection how much a call needs; on a fresh one a call costs some 3 KB more).
The steps are counted in the stream that carries them: a step counts when it was admitted and stored. The worker is suspended
meanwhile. A bare grpc.aio server is read as well: what it needs for a call is the part that no gateway can save.
"""

import asyncio
import time

import nats
import psutil

from tests.bench.contestants import Endpoint
from tests.bench.parts import BenchError, LoadGenerator, Part
from tests.bench.report import Memory

PATIENCE_S = 15.0
ADD = 250


async def stored(url: str, stream: str) -> int:
    client = await nats.connect(url)
    try:
        info = await client.jetstream().stream_info(stream)
    finally:
        await client.close()
    return int(info.state.messages)


def wait_stored(endpoint: Endpoint, gateway: Part, wanted: int) -> int:
    """Returns once `wanted` steps are stored or patience ends; how many are. Without a stream there is nothing to wait for."""
    if not endpoint.stream:
        time.sleep(0.1)
        return wanted
    until = time.monotonic() + PATIENCE_S
    while (have := asyncio.run(stored(endpoint.nats_url, endpoint.stream))) < wanted and time.monotonic() < until:
        gateway.check()
        time.sleep(0.05)
    return have


def unique_kb(part: Part) -> float:
    return float(psutil.Process(part.process.pid).memory_full_info().uss) / 1024


def settled_kb(part: Part) -> float:
    """The unique set size once it has stopped to move."""
    last = unique_kb(part)
    for _ in range(20):
        time.sleep(0.5)
        now = unique_kb(part)
        if abs(now - last) < 64:
            break
        last = now
    return now


def read(name: str, endpoint: Endpoint, generator: LoadGenerator, steps: int, warmup_s: float) -> Memory:
    """Raises BenchError when not all steps come to be in flight, or do not stay."""
    gateway = endpoint.parts[0]
    generator.ask(do="warm", warmup_s=warmup_s, **endpoint.job)
    if not endpoint.held_request:
        psutil.Process(endpoint.parts[1].process.pid).suspend()
    before_kb = settled_kb(gateway)
    for wanted in range(ADD, steps + ADD, ADD):  # little by little: a burst of thousands is another question
        generator.ask(do="hold", in_flight=ADD, **endpoint.held_job)
        if (have := wait_stored(endpoint, gateway, wanted)) < wanted:
            outcome = generator.ask(do="release")
            raise BenchError(f"only {have} of {wanted} steps came to the stream; {outcome['first_error']}")
    during_kb = settled_kb(gateway)
    outcome = generator.ask(do="release")
    if outcome["ended_early"]:
        raise BenchError(f"{outcome['ended_early']} of {steps} calls did not stay in flight; {outcome['first_error']}")
    return Memory(name, steps, before_kb, during_kb)

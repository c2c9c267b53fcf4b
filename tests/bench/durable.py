"""`make bench-durable`: what it costs that a step survives everything.

The tool `echo`, which does nothing, through nats-server, gateway, runner and tool worker with the default policies. Side by side, alone
and with --in-flight at a time, in rounds one after the other:

    floor      three calls one after the other of a gateway and a worker written plainly on JetStream, which store each result
    Execute    the same three calls, driven by the client: each result is stored, but nothing knows where the client was
    run of 1   one run with one step
    run of 3   one run with three steps, each of which takes the output of the one before: each outcome is in the run's journal

What a durable step adds is told in three ways: as the runner measured it, from sending the step to its outcome; as the time at the client
between the ends of two steps of a run; and as (run of 3 - run of 1) / 2, medians, which has all that comes between two steps.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from gateway.config import Config, parse
from gateway.up import Stack
from nearloop.v1 import gateway_pb2 as pb
from tests.bench.open_loop import percentile
from tests.bench.parts import BenchError, Parts
from tests.bench.run_client import (
    Client,
    Closed,
    Others,
    SeenRun,
    Verdict,
    closed,
    failures,
    middle,
    progress,
    say_machine,
    start_on_port,
    until,
)

STEPS = 3
TARGET_MS = 5.0
WORKERS = [("tool", "home"), ("run", "home")]
Once = Callable[[], Awaitable[Any]]


def program(steps: int) -> str:
    """Each step takes the output of the one before."""
    inputs: list[Any] = [0, *(f"${{steps.s{number}.output.n + 1}}" for number in range(steps - 1))]
    calls = [{"id": f"s{number}", "tool": "echo", "input": {"n": text}} for number, text in enumerate(inputs)]
    return json.dumps({"program": "nearloop/v1", "name": f"echo-{steps}", "steps": calls})


def configuration() -> Config:
    return parse(
        {"gateway": {"listen": "127.0.0.1:0"}, "auth": {"anonymous_tenant": "bench"}, "tools": {"modules": ["workers.builtin_tools"]}}
    )


async def calls(client: Client, kind: "pb.Kind.ValueType" = pb.KIND_TOOL) -> None:
    n = 0
    for _ in range(STEPS):
        n = (await client.execute(kind, "echo", {"n": n}))["n"] + 1


def at(share: float) -> Callable[[Closed[Any]], float]:
    return lambda done: done.ms(share)


def ended(number: int) -> Callable[[SeenRun], float]:
    return lambda seen: seen.steps[number][2]


class Bench:
    def __init__(self, options: argparse.Namespace, contestants: dict[str, Once]) -> None:
        self._options = options
        self._contestants = contestants
        self.found: dict[tuple[str, int], list[Closed[Any]]] = {}

    async def play(self) -> None:
        for number in range(self._options.rounds):
            for in_flight in (1, self._options.in_flight):
                for name, once in self._contestants.items():
                    progress(f"round {number + 1} of {self._options.rounds}: {name}, {in_flight} in flight")
                    done = await closed(once, in_flight, self._options.warmup, self._options.seconds)
                    self.found.setdefault((name, in_flight), []).append(done)
        progress()

    def middle(self, name: str, in_flight: int, value: Callable[[Closed[Any]], float]) -> float:
        """The median over the rounds."""
        return middle([value(done) for done in self.found[name, in_flight]])

    def beside(self, name: str, in_flight: int) -> float:
        """Throughput as a multiple of that of Execute, the median over the rounds."""
        pairs = zip(self.found[name, in_flight], self.found["Execute", in_flight], strict=True)
        return middle([one.per_s / other.per_s for one, other in pairs])

    def table(self) -> None:
        for in_flight in (1, self._options.in_flight):
            print(f"\n{f'{in_flight} in flight':<18}{'a second':>10}{'p50 ms':>9}{'p99 ms':>9}{'beside Execute':>16}{'steps/s':>9}")
            for name in self._contestants:
                rate = self.middle(name, in_flight, lambda done: done.per_s)
                p50, p99 = (self.middle(name, in_flight, at(share)) for share in (0.5, 0.99))
                steps = rate * (1 if name == "run of 1" else STEPS)
                failed = "".join(failures(done) for done in self.found[name, in_flight])
                print(f"{name:<18}{rate:>10.1f}{p50:>9.2f}{p99:>9.2f}{self.beside(name, in_flight):>15.2f}x{steps:>9.0f}{failed}")

    def step(self, in_flight: int) -> float:
        """Prints what a durable step takes; gives the median of what a step adds to a run, ms."""
        runs: list[SeenRun] = [seen for done in self.found[f"run of {STEPS}", in_flight] for seen in done.results]
        took = [1000 * seconds for seen in runs for _, seconds, _ in seen.steps]
        apart = [1000 * (later[2] - one[2]) for seen in runs for one, later in zip(seen.steps, seen.steps[1:], strict=False)]
        whole, single = (self.middle(name, in_flight, at(0.5)) for name in (f"run of {STEPS}", "run of 1"))
        execute = [latency / STEPS for latency in (self.middle("Execute", in_flight, at(share)) for share in (0.5, 0.99))]
        added = (whole - single) / (STEPS - 1)
        print(f"\n{f'a durable step, {in_flight} in flight':<52}{'p50 ms':>9}{'p99 ms':>9}")
        for title, values in (
            ("from being sent to its outcome, as the runner saw it", took),
            ("between the ends of two steps, at the client", apart),
        ):
            print(f"{title:<52}{percentile(values, 0.5):>9.2f}{percentile(values, 0.99):>9.2f}")
        print(f"{f'(run of {STEPS} - run of 1) / {STEPS - 1}':<52}{added:>9.2f}")
        print(f"{'a third of the three Executes':<52}{execute[0]:>9.2f}{execute[1]:>9.2f}")
        return added

    def stages(self) -> None:
        """Where the time of a run goes, alone, at the client."""
        runs: list[SeenRun] = [seen for done in self.found[f"run of {STEPS}", 1] for seen in done.results if len(seen.steps) == STEPS]
        marks: list[tuple[str, Callable[[SeenRun], float]]] = [
            ("accepted: stored durably", lambda seen: seen.accepted_s),
            ("a runner has it", lambda seen: seen.started_s),
            *((f"step {number + 1} has ended", ended(number)) for number in range(STEPS)),
            ("all steps in the journal", lambda seen: seen.summary_s),
            ("result", lambda seen: seen.took_s),
        ]
        print(f"\n{'a run of three, alone, seen at the client':<42}{'after ms':>9}{'for ms':>9}")
        before = 0.0
        for title, when in marks:
            after = 1000 * middle([when(seen) for seen in runs])
            print(f"{title:<42}{after:>9.2f}{after - before:>9.2f}")
            before = after

    def record(self) -> list[dict[str, Any]]:
        return [
            {
                "what": name,
                "in_flight": in_flight,
                "per_s": done.per_s,
                "p50_ms": done.ms(0.5),
                "p99_ms": done.ms(0.99),
                "failed": done.failed,
            }
            for (name, in_flight), rounds in self.found.items()
            for done in rounds
        ]


async def play(options: argparse.Namespace, folder: Path) -> int:
    about = say_machine()
    with Parts(folder) as parts:
        _, url = parts.start_nats_server()
        _, floor_port = start_on_port(parts, "floor", "tests.bench.floor", "gateway", "--nats", url)
        parts.start_module("floor-worker", "tests.bench.floor", "worker", "--nats", url, "--commit")
        async with Stack(configuration(), workers=WORKERS, triton=False) as stack:
            client, floor = Client(stack.gateway_address), Client(f"127.0.0.1:{floor_port}")
            try:
                whole, single = program(STEPS), program(1)

                async def ends() -> bool:
                    return len((await client.run(whole)).steps) == STEPS

                await until(ends, "a first run")
                contestants: dict[str, Once] = {
                    "floor": lambda: calls(floor),
                    "Execute": lambda: calls(client),
                    "run of 1": lambda: client.run(single),
                    f"run of {STEPS}": lambda: client.run(whole),
                }
                bench = Bench(options, contestants)
                others = Others()
                await bench.play()
                noise = others.line()
            finally:
                await client.close()
                await floor.close()
    bench.table()
    added = {in_flight: bench.step(in_flight) for in_flight in (1, options.in_flight)}
    bench.stages()
    print(f"\n{noise}")
    print(Verdict("p50 of what a durable step adds to a run, alone", added[1], TARGET_MS, True, "ms").line())
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "measured": bench.record()}, indent=1))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-durable", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of half a minute; its numbers mean little")
    parser.add_argument("--seconds", type=float, help="length of a measurement after its warm-up (5)")
    parser.add_argument("--warmup", type=float, help="seconds before each measurement (1.5)")
    parser.add_argument("--rounds", type=int, help="medians of so many (3)")
    parser.add_argument("--in-flight", type=int, default=64, help="at a time, beside alone (64)")
    parser.add_argument("--json", type=Path, help="write everything there", metavar="FILE")
    options = parser.parse_args()
    options.seconds = options.seconds or (1.5 if options.quick else 5.0)
    options.warmup = options.warmup or (0.5 if options.quick else 1.5)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def main() -> int:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="nearloop-bench-") as folder:
        try:
            return uvloop.run(play(options, Path(folder)))
        except BenchError as error:
            print(f"not measured: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())

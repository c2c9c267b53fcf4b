"""`make bench`: Nearloop's path beside a hand-written floor and beside calling Triton directly, in one run on one machine.

What is measured, for 1, 16, 64 and 256 calls in flight in a closed loop, the client in a process of its own:

    echo             a bare grpc.aio server that answers with the request's bytes
    floor            grpc.aio -> JetStream work queue -> pull worker -> core NATS reply, written plainly, no policy
    floor-commit     the same, and the worker stores the result by compare-and-set before it replies, as Nearloop does
    nearloop         Execute of the tool `echo` through the real gateway and worker with the default policies; the token bucket
                     decides about every step as always, its rate is beyond what can be reached (the default of 5,000/s may not be)
    nearloop-bare    the same with no policy at all: what deciding costs
    triton           the model `echo` of a real Triton through tritonclient.grpc.aio
    nearloop-triton  Execute of the same model through Nearloop
    memory           what a step in flight costs the gateway, with thousands of steps held (echo, floor, nearloop)

Each pipeline is one gateway process, one worker process and one nats-server that stores on files, with uvloop in every Python
process; requests and answers are the same protobuf messages with about 100 bytes of JSON. All contestants run side by side and
idle; in every round each is measured in turn, so that a drift of the machine meets all alike. A table shows medians over the
rounds; a ratio is the median of the ratios of single rounds, whose two measurements lie close together.

Client, gateway, worker and nats-server share this machine's cores: throughput says what the whole path costs in processor time,
which is also shown by process, and is less than what a gateway with cores of its own would do.

A measurement that fails is repeated once, five times as long, since a loaded machine can stall anybody; the report counts these.

Ends with 1 when something could not be measured. A missed target is said, and is no error.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench import machine, memory, report
from tests.bench.contestants import CONTESTANTS, Contestant, Endpoint, Site, wait_until_ready
from tests.bench.parts import BenchError, LoadGenerator, Parts

IN_FLIGHT, QUICK_IN_FLIGHT = (1, 16, 64, 256), (1, 64)
HELD_STEPS, QUICK_HELD_STEPS = 5000, 500
RETRY_LONGER = 5
MEMORY = "memory"


def parse_arguments() -> argparse.Namespace:
    names = [contestant.name for contestant in CONTESTANTS] + [MEMORY]
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of less than half a minute; its numbers mean little")
    parser.add_argument("--rounds", type=int, help="how often each contestant is measured (3)")
    parser.add_argument("--seconds", type=float, help="length of each measurement, after a warm-up of a third of that (3)")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(names)}", metavar="A,B")
    parser.add_argument("--json", type=Path, help="write everything there, single samples included", metavar="FILE")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.seconds = arguments.seconds or (0.4 if arguments.quick else 3.0)
    if unknown := set(arguments.only or ()) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    arguments.only = arguments.only or names
    return arguments


class Run:
    """One run: what was measured so far, and what could not be."""

    def __init__(self, arguments: argparse.Namespace, generator: LoadGenerator, site: Site) -> None:
        self.arguments = arguments
        self.generator = generator
        self.site = site
        self.samples: list[report.Sample] = []
        self.memory: list[report.Memory] = []
        self.missing: dict[str, str] = {}

    def give_up(self, name: str, error: BenchError) -> None:
        self.missing[name] = str(error)
        print(f"  {name}: {error}", flush=True)

    def start(self) -> dict[str, Endpoint]:
        """Starts all contestants, then waits for each."""
        endpoints: dict[str, Endpoint] = {}
        wanted: list[Contestant] = [contestant for contestant in CONTESTANTS if contestant.name in self.arguments.only]
        print(f"starting {', '.join(contestant.name for contestant in wanted)} ...", flush=True)
        for contestant in wanted:
            try:
                endpoints[contestant.name] = contestant.start(self.site)
            except BenchError as error:
                self.give_up(contestant.name, error)
        for name, endpoint in list(endpoints.items()):
            try:
                wait_until_ready(endpoint, self.generator)
            except BenchError as error:
                self.give_up(name, error)
                del endpoints[name]
        return endpoints

    def measure(self, name: str, endpoint: Endpoint, round_number: int, in_flight: int) -> None:
        """A loaded machine can stall a contestant for longer than a short measurement: then once more, for longer, and it is said."""
        seconds = self.arguments.seconds
        try:
            self.measure_for(seconds, name, endpoint, round_number, in_flight)
        except BenchError as error:
            longer = RETRY_LONGER * seconds
            print(f"  {name}, {in_flight} in flight: failed ({error}); repeated once for {longer:g} s", flush=True)
            self.measure_for(longer, name, endpoint, round_number, in_flight, repeated=True)

    def measure_for(self, seconds: float, name: str, endpoint: Endpoint, round_number: int, in_flight: int, repeated: bool = False) -> None:
        parts = (self.generator.part, *endpoint.parts)
        before, busy_s, began = [part.cpu_s() for part in parts], machine.busy_s(), time.monotonic()
        answer = self.generator.ask(do="measure", in_flight=in_flight, seconds=seconds, warmup_s=seconds / 3, **endpoint.job)
        used_s = {part.name: part.cpu_s() - was for part, was in zip(parts, before, strict=True)}
        capacity_s = (time.monotonic() - began) * machine.cores()
        others = max(0.0, machine.busy_s() - busy_s - sum(used_s.values())) / capacity_s
        cpu_us = {part: 1e6 * used / answer["calls"] for part, used in used_s.items()}
        measured = answer["per_s"], answer["p50_ms"], answer["p99_ms"]
        sample = report.Sample(name, round_number, in_flight, *measured, cpu_us, others, repeated)
        self.samples.append(sample)
        print(
            f"  round {round_number}/{self.arguments.rounds}  {in_flight:>3} in flight  {name:<16}"
            f"{sample.per_s:>8,.0f}/s  p50 {sample.p50_ms:.2f} ms  p99 {sample.p99_ms:.2f} ms",
            flush=True,
        )

    def measure_all(self) -> None:
        endpoints = self.start()
        for round_number in range(1, self.arguments.rounds + 1):
            for in_flight in QUICK_IN_FLIGHT if self.arguments.quick else IN_FLIGHT:
                for name, endpoint in list(endpoints.items()):
                    try:
                        self.measure(name, endpoint, round_number, in_flight)
                    except BenchError as error:
                        self.give_up(name, endpoint.explain(error))
                        del endpoints[name]

    def measure_memory(self) -> None:
        steps = QUICK_HELD_STEPS if self.arguments.quick else HELD_STEPS
        print(f"memory with {steps:,} steps in flight ...", flush=True)
        for contestant in CONTESTANTS:
            if contestant.start_roomy is not None:
                try:
                    endpoint = contestant.start_roomy(self.site)
                    wait_until_ready(endpoint, self.generator)
                    self.memory.append(memory.read(contestant.name, endpoint, self.generator, steps, self.arguments.seconds))
                except BenchError as error:
                    self.give_up(contestant.name, error)


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    facts = machine.describe()
    print("  ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    print("client, gateway, worker and nats-server share these cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="nearloop-bench-") as folder, Parts(Path(folder)) as parts:
        generator = LoadGenerator(parts.start_module("client", "tests.bench.load"))
        run = Run(arguments, generator, Site(parts))
        if set(arguments.only) - {MEMORY}:
            run.measure_all()
        if MEMORY in arguments.only:
            run.measure_memory()
    print(report.text(run.samples, run.memory, run.missing))
    print(f"took {time.monotonic() - began:.0f} s; {arguments.rounds} rounds of {arguments.seconds:g} s", end="")
    print("; a smoke run: do not quote these numbers" if arguments.quick else "")
    if arguments.json:
        settings: dict[str, Any] = {"rounds": arguments.rounds, "seconds": arguments.seconds, "quick": arguments.quick}
        arguments.json.write_text(json.dumps(report.document(facts, settings, run.samples, run.memory, run.missing), indent=1) + "\n")
    return 1 if run.missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

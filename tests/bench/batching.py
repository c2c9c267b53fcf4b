"""`python -m tests.bench.batching`: batches that the worker makes against those of Triton's own dynamic batcher, on the real path.

One Triton serves the same model several times: an execution of b rows takes 20 ms + b * 2 ms, at most 16 rows, one instance. `batched`
has no batcher, so that the worker makes its batches, with the policy `marginal` and one setting; `batched-<delay>` have Triton's batcher
with that max_queue_delay, and go through `passthrough`. Capacity is measured first: what Triton's batcher completes when twice as much
comes as full batches could do. At each load, a share of that, all of them get the same Poisson arrivals one after the other; the client is
an open loop, latency counts from the intended time. The best delay of a load is what a person could have tuned it to for this load; the
target is a mean latency of at most 1.05 times that.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from gateway.client import NearloopClient
from gateway.config import Config, parse
from gateway.up import Stack
from nearloop.v1 import gateway_pb2 as pb
from tests.bench import machine
from tests.bench.parts import BenchError, LoadGenerator, Parts

MODEL = "batched"
FIXED_MS, EACH_MS, MOST = 20.0, 2.0, 16
NOMINAL_PER_S = MOST * 1000 / (FIXED_MS + EACH_MS * MOST)
LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
DELAYS_MS = (0.0, 2.0, 5.0, 10.0)
POLICIES = ("fixed_limit", "bounded_wait", "nearest_region", "passthrough", "marginal", "parent_ratio")
TARGET = 1.05
TIMEOUT_S = 10.0
MOST_LATE_MS = 20.0  # of the generator's p99: beyond it somebody else had the machine
TRIES = 3
API_KEY = "bench-key"


def lay_out_models(repository: Path, delays_ms: tuple[float, ...]) -> None:
    source = Path(__file__).parent / "models" / MODEL
    for delay_ms in (None, *delays_ms):
        folder = repository / model_name(delay_ms)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
        if delay_ms is not None:
            text = (source / "config.pbtxt").read_text().replace(f'name: "{MODEL}"', f'name: "{folder.name}"', 1)
            batcher = f"dynamic_batching {{ max_queue_delay_microseconds: {round(delay_ms * 1000)} }}\n"
            (folder / "config.pbtxt").write_text(text + batcher)


def model_name(delay_ms: float | None) -> str:
    return MODEL if delay_ms is None else f"{MODEL}-{round(delay_ms * 1000)}us"


def configuration(repository: Path) -> Config:
    return parse(
        {
            "gateway": {"listen": "127.0.0.1:0"},
            "auth": {"keys": [{"tenant": "bench", "sha256": hashlib.sha256(API_KEY.encode()).hexdigest()}]},
            "triton": {"repository": str(repository)},
            "policies": [{"use": name} for name in POLICIES],
        }
    )


class Bench:
    def __init__(self, options: argparse.Namespace, generator: LoadGenerator, address: str) -> None:
        self._options = options
        self._generator = generator
        self._address = address

    async def play(self, model: str, rate_per_s: float, seed: int) -> dict[str, Any]:
        """What a model did; measured again when the generator itself was kept from the processor.

        The generator blocks on a pipe, so it is asked from a thread: the stack is supervised meanwhile.
        """
        content = pb.Content(content_type="application/json", data=b'{"question":"how do I join two paths?"}')
        step = pb.Step(kind=pb.KIND_INFER, target=model, input=pb.Payload(content=content))
        request = base64.b64encode(pb.ExecuteRequest(step=step).SerializeToString()).decode()
        flow = {"name": "all", "rate_per_s": rate_per_s, "key": API_KEY, "request": request, "timeout_s": TIMEOUT_S}
        job = {"address": self._address, "flows": [flow], "warmup_s": self._options.warmup, "seconds": self._options.seconds, "seed": seed}
        for _ in range(TRIES):
            done = await asyncio.to_thread(self._generator.ask, **job)
            if done["late_p99_ms"] <= MOST_LATE_MS:
                break
        found: dict[str, Any] = done["flows"]["all"]
        return found | {"goodput_per_s": done["goodput_per_s"], "late_p99_ms": done["late_p99_ms"]}

    async def round(self, rate_per_s: float, seed: int) -> list[dict[str, Any]]:
        """Triton's batcher with each delay, and last the worker's, with the same arrivals."""
        return [await self.play(model_name(delay), rate_per_s, seed) for delay in (*self._options.delays, None)]


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median of the mean latencies."""
    return sorted(found, key=lambda one: one["mean_ms"])[len(found) // 2]


def line(load: float, rate_per_s: float, tuned: list[dict[str, Any]], ours: dict[str, Any]) -> str:
    best = min(one["mean_ms"] for one in tuned)
    means = "".join(f"{one['mean_ms']:>9.2f}" for one in tuned)
    p99 = ours["p99_ms"] / min(one["p99_ms"] for one in tuned)
    late = max(one["late_p99_ms"] for one in (*tuned, ours))
    lost = sum(one["sent"] - one["ok"] for one in (*tuned, ours))
    return (
        f"load {load:<6g}{rate_per_s:>6.0f}/s{'':<22}{means}{best:>9.2f}{ours['mean_ms']:>10.2f}{ours['mean_ms'] / best:>8.3f}{p99:>8.2f}"
        f"{late:>10.1f}{f'   {lost} not answered' if lost else ''}"
    )


async def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    lay_out_models(folder / "models", tuple({0.0: None, **dict.fromkeys(options.delays)}))
    rows = []
    with Parts(folder) as parts:
        async with Stack(configuration(folder / "models"), workers=[("infer", "home")]) as stack:
            if options.core >= 0:
                os.environ["NEARLOOP_BENCH_CORE"] = str(options.core)
            generator = LoadGenerator(parts.start_module("client", "tests.bench.open_loop"))
            bench = Bench(options, generator, stack.gateway_address)
            await bench.play(MODEL, 0.5 * NOMINAL_PER_S, seed=0)  # connections are made, costs are learnt
            capacity = {model: (await bench.play(model, 2 * NOMINAL_PER_S, seed=0))["goodput_per_s"] for model in (model_name(0.0), MODEL)}
            capacity_per_s = capacity[model_name(0.0)]
            print(f"\nfull batches could do {NOMINAL_PER_S:.0f}/s; with twice that, Triton's batcher does {capacity_per_s:.0f}/s", end="")
            print(f" and the worker {capacity[MODEL]:.0f}/s", flush=True)
            heads = "".join(f"{f'{delay:g} ms':>9}" for delay in options.delays)
            print(f"\nmean latency, ms    Triton waits at most{heads}{'best':>9}{'marginal':>10}{'ratio':>8}{'p99':>8}{'late p99':>10}")
            for number, load in enumerate(options.loads):
                rate_per_s = load * capacity_per_s
                rounds = [await bench.round(rate_per_s, number + 100 * one) for one in range(options.rounds)]
                *tuned, ours = (middle(list(found)) for found in zip(*rounds, strict=True))
                print(line(load, rate_per_s, tuned, ours), flush=True)
                ratio = ours["mean_ms"] / min(one["mean_ms"] for one in tuned)
                rows.append(
                    {"load": load, "tuned": dict(zip(map(str, options.delays), tuned, strict=True)), "marginal": ours, "ratio": ratio}
                )
            async with NearloopClient(stack.gateway_address, api_key=API_KEY) as client:
                cost = next(status.batch_cost for status in await client.targets() if status.target.name == MODEL)
            if cost is not None:
                print(f"\nlearnt from {cost.batches} batches: {cost.fixed_s * 1e3:.1f} ms + {cost.each_s * 1e3:.2f} ms for each row")
    worst = max(rows, key=lambda row: row["ratio"])
    verdict = "reached" if worst["ratio"] <= TARGET else "MISSED"
    print(f"worst ratio of mean latencies {worst['ratio']:.3f}, at load {worst['load']:g}; target <= {TARGET:g}: {verdict}")
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="batching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute; its numbers mean little")
    parser.add_argument("--seconds", type=float, help="length of a phase after its warm-up (20)")
    parser.add_argument("--warmup", type=float, help="seconds of each phase that are not measured (3)")
    parser.add_argument("--rounds", type=int, default=1, help="medians of so many, for a machine that others use as well (1)")
    parser.add_argument("--loads", type=_numbers, help="shares of the capacity", metavar="A,B")
    parser.add_argument("--delays", type=_numbers, help="Triton's delays, ms", metavar="A,B")
    parser.add_argument("--json", type=Path, help="write everything there", metavar="FILE")
    options = parser.parse_args()
    options.seconds = options.seconds or (4.0 if options.quick else 20.0)
    options.warmup = options.warmup or (1.0 if options.quick else 3.0)
    options.loads = options.loads or ((0.2, 0.8) if options.quick else LOADS)
    options.delays = options.delays or ((0.0, 5.0) if options.quick else DELAYS_MS)
    return options


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> int:
    options = parse_arguments()
    available = sorted(os.sched_getaffinity(0))
    options.core = available[-1] if len(available) > 1 else -1
    if options.core >= 0:
        os.sched_setaffinity(0, set(available[:-1]))  # the stack inherits it
    about = machine.describe()
    print(f"{about['cpu']}, {len(available)} cores ({about['memory']}), Python {about['python']}; the load generator has ", end="")
    print(f"core {options.core} for itself" if options.core >= 0 else "no core for itself")
    with tempfile.TemporaryDirectory(prefix="nearloop-bench-") as folder:
        try:
            rows = asyncio.run(run(options, Path(folder)))
        except BenchError as error:
            print(f"not measured: {error}", file=sys.stderr)
            return 1
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "loads": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

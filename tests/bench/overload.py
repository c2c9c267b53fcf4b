"""`make bench-overload`: what the default policies do with more work than there is capacity, on the real path.

A Triton model of known service time (20 ms, 4 instances or --instances: 200 steps a second) behind gateway, nats-server and infer worker.
The client is an open loop in a process of its own, on a core of its own where there are two: calls leave at Poisson times whatever became
of the ones before, and latency counts from the intended time. In one run:

    loads      .5, 1, 2, 5 and 10 times the capacity, with the default policies and then with admission switched off (no admission,
               limit, fairness or backpressure policy) on a second stack that shares the Triton
    tenants    an elephant that asks for four times the capacity beside ten mice, and the mice alone
    tiers      three times the capacity in six tiers, the top one .8 of it
    halving    twice the capacity while the service time doubles in mid-run, and goes back

Capacity is measured first: the same model, never without work, admission switched off. Goodput is what ended well in the measured time,
as a share of that. Targets are printed beside what was seen; a missed one is said, and is no error.
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
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.config import DEFAULT_POLICIES, Config, parse
from gateway.up import Stack
from nearloop.v1 import gateway_pb2 as pb
from tests.bench import machine
from tests.bench.parts import BenchError, LoadGenerator, Parts

SERVICE_MS = 20.0
LOADS = (0.5, 1.0, 2.0, 5.0, 10.0)
MICE = 10
TENANTS = ("load", "elephant", "gold", "plain", *(f"mouse-{number}" for number in range(MICE)))
LANES = {"interactive": pb.LANE_INTERACTIVE, "standard": pb.LANE_STANDARD, "batch": pb.LANE_BATCH}
OFF = ("nearest_region", "passthrough", "parent_ratio")
TIMEOUT_S = 2.0
QUIET_TRIES = 90


@dataclass
class Verdict:
    what: str
    value: float
    target: float
    at_most: bool

    def line(self) -> str:
        reached = self.value <= self.target if self.at_most else self.value >= self.target
        sign = "<=" if self.at_most else ">="
        return f"{self.what:<64}{self.value:>8.2f}   target {sign} {self.target:<7g}{'reached' if reached else 'MISSED'}"


@dataclass
class Bench:
    options: argparse.Namespace
    generator: LoadGenerator
    service_file: Path
    stacks: Mapping[str, Stack]
    verdicts: list[Verdict] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def nominal_per_s(self) -> float:
        return float(self.options.instances * 1000 / SERVICE_MS)

    def flow(self, tenant: str, rate_per_s: float, lane: str = "standard", name: str = "") -> dict[str, Any]:
        content = pb.Content(content_type="application/json", data=b'{"question":"how do I join two paths?"}')
        step = pb.Step(kind=pb.KIND_INFER, target="slow", lane=LANES[lane], input=pb.Payload(content=content))
        request = base64.b64encode(pb.ExecuteRequest(step=step).SerializeToString()).decode()
        return {"name": name or tenant, "rate_per_s": rate_per_s, "key": key(tenant), "request": request, "timeout_s": TIMEOUT_S}

    async def play(self, stack: str, flows: Sequence[Mapping[str, Any]], seconds: float, **more: Any) -> dict[str, Any]:
        """One phase. The load generator blocks on a pipe, so it is asked from a thread: the stack is supervised meanwhile."""
        job = {"address": self.stacks[stack].gateway_address, "flows": list(flows), "warmup_s": self.options.warmup, "seconds": seconds}
        done = await asyncio.to_thread(self.generator.ask, **(job | more))
        await self.quiet(stack)
        return done

    async def quiet(self, stack: str) -> None:
        """Waits until what an overloaded phase left behind is gone: one call after the other takes hardly longer than its service."""
        flow = self.flow("load", 1.0)
        probe = {"address": self.stacks[stack].gateway_address, "flows": [flow], "warmup_s": 0.0, "seconds": 1.0, "closed": 1}
        for _ in range(QUIET_TRIES):
            found = (await asyncio.to_thread(self.generator.ask, **probe))["flows"]["load"]
            if found["ok"] == found["sent"] and found["p50_ms"] < 2 * SERVICE_MS:
                return
        raise BenchError(f"the stack {stack!r} was not quiet again after {QUIET_TRIES} tries: {found}")

    def judge(self, what: str, value: float, target: float, *, at_most: bool) -> None:
        self.verdicts.append(Verdict(what, value, target, at_most))


def key(tenant: str) -> str:
    return f"bench-key-of-{tenant}"


def configuration(folder: Path, policies: Sequence[Mapping[str, Any]], triton: str = "") -> Config:
    return parse(
        {
            "gateway": {"listen": "127.0.0.1:0"},
            "auth": {"keys": [{"tenant": tenant, "sha256": hashlib.sha256(key(tenant).encode()).hexdigest()} for tenant in TENANTS]},
            "triton": {"url": triton, "repository": "" if triton else str(folder / "models")},
            "policies": list(policies),
        }
    )


def default_policies() -> list[dict[str, Any]]:
    """As shipped, and one tenant that counts as important, so that there are six tiers."""
    shipped = [section.model_dump(exclude_defaults=True) for section in DEFAULT_POLICIES]
    return [{"use": "tenant_tiers", "important": ["gold"]}, *shipped]


async def measure_capacity(bench: Bench) -> float:
    """What the model does when it never waits for work: a closed loop with four calls for each instance, admission off."""
    done = await bench.play("off", [bench.flow("load", bench.nominal_per_s)], bench.options.seconds, closed=4 * bench.options.instances)
    return float(done["goodput_per_s"])


async def loads(bench: Bench, capacity: float, name: str) -> float:
    """The table for one stack; gives the 99th percentile without load, ms."""
    alone = await bench.play(name, [bench.flow("load", 0.1 * bench.nominal_per_s)], 2 * bench.options.seconds)
    unloaded = float(alone["flows"]["load"]["p99_ms"])
    print(f"\ncapacity {capacity:.0f} steps/s (nominal {bench.nominal_per_s:.0f}), p99 unloaded {unloaded:.1f} ms")
    columns = (("goodput", 9), ("p50 ms", 9), ("p99 ms", 9), ("rejected", 10), ("p99 ms", 8), ("late", 7), ("hints", 7))
    print(f"\n{'load':>6}  {'policies':<10}{''.join(f'{title:>{width}}' for title, width in columns)}  answers")
    for load in bench.options.loads:
        done = await bench.play(name, [bench.flow("load", load * capacity)], bench.options.seconds)
        flow = done["flows"]["load"]
        bench.record[f"load {load:g} {name}"] = done
        share = done["goodput_per_s"] / capacity
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(flow["reasons"].items()))
        expired = f"{flow['expired']} expired" if flow["expired"] else ""
        failed = ", ".join(f"{count} {text}" for text, count in flow["failed"].items())
        rejected = flow["rejected"] / max(1, flow["sent"])
        print(
            f"{load:>5g}x  {name:<10}{share:>9.1%}{flow['p50_ms']:>9.1f}{flow['p99_ms']:>9.1f}{rejected:>10.1%}"
            f"{flow['reject_p99_ms']:>8.1f}{done['late_p99_ms']:>7.1f}{flow['hints'] / max(1, flow['rejected']):>7.0%}"
            f"  {'; '.join(part for part in (reasons, expired, failed) if part)}",
            flush=True,
        )
        if name == "defaults" and load >= 2:
            bench.judge(f"{load:g}x: goodput / capacity", share, 0.95, at_most=False)
            bench.judge(f"{load:g}x: p99 of the admitted / unloaded", flow["p99_ms"] / unloaded, 2.5, at_most=True)
            bench.judge(f"{load:g}x: p99 of a reject, ms", flow["reject_p99_ms"], 5.0, at_most=True)
    return unloaded


async def tenants(bench: Bench, capacity: float) -> None:
    mice = [bench.flow(f"mouse-{number}", 0.03 * capacity, name="mice") for number in range(MICE)]
    print(f"\n{'tenants':<34}{'mice p50 ms':>13}{'p99 ms':>9}{'answered':>10}{'elephant answered':>19}")
    p99 = {}
    for title, flows in (("ten mice alone", mice), ("and an elephant at 4x", [*mice, bench.flow("elephant", 4 * capacity)])):
        done = await bench.play("defaults", flows, 2 * bench.options.seconds)
        bench.record[title] = done
        found, elephant = done["flows"]["mice"], done["flows"].get("elephant")
        p99[title] = found["p99_ms"]
        big = f"{elephant['ok'] / elephant['sent']:>19.1%}" if elephant else ""
        print(f"{title:<34}{found['p50_ms']:>13.1f}{found['p99_ms']:>9.1f}{found['ok'] / found['sent']:>10.1%}{big}", flush=True)
        if elephant:
            bench.judge("elephant: share of the mice's steps that were answered", found["ok"] / found["sent"], 0.99, at_most=False)
    first, second = p99.values()
    bench.judge("elephant: p99 of the mice / alone", second / first, 1.3, at_most=True)


async def tiers(bench: Bench, capacity: float) -> None:
    order = [(tenant, lane) for lane in LANES for tenant in ("gold", "plain")]
    flows = [
        bench.flow(tenant, (0.8 if number == 0 else 0.44) * capacity, lane, name=f"{number} {lane} {tenant}")
        for number, (tenant, lane) in enumerate(order)
    ]
    done = await bench.play("defaults", flows, 2 * bench.options.seconds)
    bench.record["tiers"] = done
    print(f"\n{'three times the capacity, tier':<34}{'sent/s':>9}{'answered':>10}{'p50 ms':>9}{'p99 ms':>9}")
    for name, found in done["flows"].items():
        rate = found["sent"] / (2 * bench.options.seconds)
        print(f"{name:<34}{rate:>9.0f}{found['ok'] / max(1, found['sent']):>10.1%}{found['p50_ms']:>9.1f}{found['p99_ms']:>9.1f}")
    top = next(iter(done["flows"].values()))
    bench.judge("tiers: share of the top tier that was answered", top["ok"] / top["sent"], 0.999, at_most=False)


async def halving(bench: Bench, capacity: float, unloaded_ms: float) -> None:
    """Settled: from when on, for good until the next change, goodput of a second is within 10 % of the new capacity and its p99 within
    2.5 times what a step takes now."""
    phase_s, window_s = 8.0, 0.25
    job = asyncio.create_task(bench.play("defaults", [bench.flow("load", 2 * capacity)], 3 * phase_s, window_s=window_s))
    await asyncio.sleep(bench.options.warmup + phase_s)
    bench.service_file.write_text(str(2 * SERVICE_MS))
    await asyncio.sleep(phase_s)
    bench.service_file.write_text(str(SERVICE_MS))
    done = await job
    bench.record["halving"] = done
    windows = done["windows"]
    print(f"\nhalved after {phase_s:g} s, restored after {2 * phase_s:g} s: completions a second and p99 ms by second")
    per = round(1 / window_s)
    for start in range(0, len(windows) - per + 1, per):
        part = windows[start : start + per]
        print(f"{part[0]['at_s']:>6.0f} s{sum(one['per_s'] for one in part) / per:>8.0f}/s{max(one['p99_ms'] for one in part):>8.0f} ms")
    for title, from_s, factor in (("halved", phase_s, 2.0), ("restored", 2 * phase_s, 1.0)):
        wanted, most_ms = capacity / factor, 2.5 * (unloaded_ms + (factor - 1) * SERVICE_MS)
        bad_s = 0.0
        starts = [index for index, one in enumerate(windows) if from_s <= one["at_s"] <= from_s + phase_s - 1]
        for index in starts:
            part = windows[index : index + per]
            goodput = sum(one["per_s"] for one in part) / per
            if abs(goodput - wanted) > 0.1 * wanted or max(one["p99_ms"] for one in part) > most_ms:
                bad_s = windows[index]["at_s"] + window_s - from_s
        bench.judge(f"{title}: settled after, s", bad_s, 2.0, at_most=True)


async def run(options: argparse.Namespace, folder: Path) -> int:
    shutil.copytree(Path(__file__).parent / "models/slow", folder / "models/slow", ignore=shutil.ignore_patterns("__pycache__"))
    model = folder / "models/slow/config.pbtxt"
    model.write_text(model.read_text().replace("count: 4", f"count: {options.instances}"))
    service_file = folder / "service_ms"
    service_file.write_text(str(SERVICE_MS))
    workers = [("infer", "home")]
    with Parts(folder) as parts:
        async with AsyncExitStack() as stacks:
            first = await stacks.enter_async_context(Stack(configuration(folder, default_policies()), workers=workers))
            triton = first.config.triton.url
            plain = configuration(folder, [{"use": name} for name in OFF], triton)
            second = await stacks.enter_async_context(Stack(plain, workers=workers, triton=False))
            if options.core >= 0:
                os.environ["NEARLOOP_BENCH_CORE"] = str(options.core)
            generator = LoadGenerator(parts.start_module("client", "tests.bench.open_loop"))
            bench = Bench(options, generator, service_file, {"defaults": first, "off": second})
            capacity = await measure_capacity(bench)
            unloaded_ms = await loads(bench, capacity, "defaults")
            for name, phase in (("tenants", tenants), ("tiers", tiers)):
                if name in options.only:
                    await phase(bench, capacity)
            if "halving" in options.only:
                await halving(bench, capacity, unloaded_ms)
            await loads(bench, capacity, "off")  # last: what it leaves behind would be in the way of the others
    print()
    for verdict in bench.verdicts:
        print(verdict.line())
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.describe(), "capacity_per_s": capacity, "phases": bench.record}, indent=1))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute; its numbers mean little")
    parser.add_argument("--seconds", type=float, help="length of a phase after its warm-up (10)")
    parser.add_argument("--warmup", type=float, help="seconds of each phase that are not measured (3)")
    parser.add_argument("--loads", type=lambda text: [float(part) for part in text.split(",")], help="times the capacity", metavar="A,B")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["tenants", "tiers", "halving"], metavar="A,B")
    parser.add_argument("--instances", type=int, default=4, help="of the model, 50 steps a second each (4): fewer for a small machine")
    parser.add_argument("--json", type=Path, help="write everything there", metavar="FILE")
    options = parser.parse_args()
    options.seconds = options.seconds or (2.0 if options.quick else 10.0)
    options.warmup = options.warmup or (1.0 if options.quick else 3.0)
    options.loads = options.loads or ([2.0, 10.0] if options.quick else list(LOADS))
    return options


def main() -> int:
    options = parse_arguments()
    available = sorted(os.sched_getaffinity(0))
    options.core = available[-1] if len(available) > 1 else -1
    if options.core >= 0 and len(available) > 2:
        os.sched_setaffinity(0, set(available[:-1]))  # the stacks inherit it
    about = machine.describe()
    print(f"{about['cpu']}, {len(available)} cores ({about['memory']}), Python {about['python']}; the load generator has ", end="")
    # With two cores, one would have to do for gateway, worker, nats-server and Triton: they may use what the generator leaves of its own.
    shares = {1: "no core for itself", 2: f"core {options.core}, of which the stack takes what is left"}
    print(shares.get(len(available), f"core {options.core} for itself"))
    with tempfile.TemporaryDirectory(prefix="nearloop-bench-") as folder:
        try:
            return asyncio.run(run(options, Path(folder)))
        except BenchError as error:
            print(f"not measured: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())

"""`make bench-regions`: ten dependent calls of an API that is far from the client, and near to a region that has workers.

Two regions, home and iad, with a nats-server each, connected as leaf nodes through a TCP relay that adds --wan-ms of round trip. The API is
--api-ms from iad's workers and as far as both together from home's: a relay each, and each region's workers have their configuration,
in which the same tool has that address. Nothing tells Nearloop these distances: it measures them. Each call takes what the one before gave:

    (a) own calls       a client at home calls the API itself over the long way, on a connection that is there
    (b) Execute         the client makes each call by Execute at home's gateway
    (c) one run         one Run; it places itself
    (d) fifty runs      --at-once Runs at the same moment; beside it what one process next to the API needs for the same calls, with
                        nothing but an HTTP client: the least that this machine could do

The target of (c) is one wide-area round trip, ten calls of the API from iad and 15 ms, each measured here; that of (d) is that the 99th
percentile is at most 1.5 times the median of (c).
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter as now_s
from typing import Any

import aiohttp
import uvloop

from gateway import addresses, parts, private_files
from gateway.addresses import free_port
from gateway.config import Config, parse
from gateway.supervisor import Part
from gateway.up import Stack
from nearloop.v1 import gateway_pb2 as pb
from tests.bench.open_loop import percentile
from tests.bench.parts import BenchError, Parts, wait_for_port
from tests.bench.run_client import Client, Others, SeenRun, Verdict, middle, progress, say_machine, start_on_port, until

HOME, FAR = "home", "iad"
CALLS, ALLOWANCE_MS, SPREAD = 10, 15.0, 1.5
TOOL = "next"
STOP_S = 25.0
Once = Callable[[], Awaitable[Any]]


def program() -> str:
    inputs: list[Any] = [0, *(f"${{steps.s{number}.output.n}}" for number in range(CALLS - 1))]
    calls = [{"id": f"s{number}", "tool": TOOL, "input": {"n": value}} for number, value in enumerate(inputs)]
    return json.dumps({"program": "nearloop/v1", "name": "ten-calls", "steps": calls})


def configuration(api_url: str) -> Config:
    return parse(
        {
            "gateway": {"listen": "127.0.0.1:0"},
            "auth": {"anonymous_tenant": "bench"},
            "tools": {"http": [{"name": TOOL, "method": "POST", "url": api_url}], "egress_allow": ["127.0.0.0/8"]},
            # It changes nothing, and says so: a run waits for its journal only where repeating a call could do harm.
            "targets": [{"kind": "tool", "name": TOOL, "read_only": True, "idempotent": True}],
        }
    )


def home_workers(folder: Path, stack: Callable[[], Stack], near: str, far: str) -> list[Part]:
    """Workers of home, which have the stack's configuration with the API's address as it is from there."""
    config_file = folder / "home.toml"

    def worker(kind: str) -> Part:
        name, ready_file = f"{kind}-{HOME}", folder / f"{kind}-{HOME}.ready"

        def before_start() -> None:
            private_files.write(config_file, stack().config_file.read_text().replace(near, far))
            ready_file.unlink(missing_ok=True)

        async def ready() -> bool:
            return ready_file.exists()

        arguments = ("--kind", kind, "--region", HOME, "--config", str(config_file), "--ready-file", str(ready_file))
        broker = (f"nats-{HOME}",)
        return parts.python_part(
            name, "workers.serve", *arguments, probe=ready, after=broker, uses=broker, before_start=before_start, stop_grace_s=STOP_S
        )

    return [worker("tool"), worker("run")]


class Bench:
    def __init__(self, options: argparse.Namespace, stack: Stack, client: Client, session: aiohttp.ClientSession) -> None:
        self._options = options
        self._stack = stack
        self._client = client
        self._session = session
        self._program = program()

    # ---- distances, measured here --------------------------------------------------------------------------------------------------

    async def wide_area_s(self) -> float:
        """From asking for a connection to the first byte that the other side says: the relay lets a round trip pass."""
        host, port = addresses.split(self._stack.part(f"wan-{FAR}").part.address)
        began_s = now_s()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            await reader.readexactly(1)
            return now_s() - began_s
        finally:
            writer.close()
            await writer.wait_closed()

    async def api_s(self, url: str) -> float:
        began_s = now_s()
        await self._ask(url, 0)
        return now_s() - began_s

    async def _ask(self, url: str, n: int) -> int:
        async with self._session.post(url, json={"n": n}) as answer:
            found: int = (await answer.json())["n"]
            return found

    # ---- the ten calls ---------------------------------------------------------------------------------------------------------------

    async def own_calls(self, url: str) -> None:
        n = 0
        for _ in range(CALLS):
            n = await self._ask(url, n)

    async def executes(self) -> None:
        n = 0
        for _ in range(CALLS):
            n = (await self._client.execute(pb.KIND_TOOL, TOOL, {"n": n}))["n"]

    async def run(self) -> SeenRun:
        seen = await self._client.run(self._program)
        if len(seen.steps) != CALLS:
            raise BenchError(f"a run ended after {len(seen.steps)} of {CALLS} calls")
        return seen

    async def placed(self) -> pb.Placement:
        return await self._client.place(self._program)

    async def is_measured(self) -> bool:
        """The distance from every region to the API is known: nothing is near by assumption."""
        estimates = (await self.placed()).estimates
        if self._options.verbose:
            print(estimates, file=sys.stderr)
        return all(one.dead_time.ToMilliseconds() > 0 and not any("not known" in why for why in one.why) for one in estimates)

    async def at_the_api(self, url: str) -> float:
        """The ten calls as --at-once programs next to the API would make them: what this machine can do. The slowest, seconds."""
        began_s = now_s()
        ends: list[float] = []

        async def one() -> None:
            await self.own_calls(url)
            ends.append(now_s() - began_s)

        await asyncio.gather(*(one() for _ in range(self._options.at_once)))
        return max(ends)


async def timed(once: Once, times: int, title: str) -> list[float]:
    """Seconds, after two that do not count."""
    found = []
    for number in range(-2, times):
        progress(f"{title}: {max(number, 0)} of {times}")
        began_s = now_s()
        await once()
        if number >= 0:
            found.append(now_s() - began_s)
    progress()
    return found


def ms(seconds: float) -> float:
    return 1000 * seconds


def say_placement(placement: pb.Placement) -> None:
    print(f"\nplaced in {placement.region}, by what was measured:")
    for one in placement.estimates:
        dead = f"{one.dead_time.ToMilliseconds()} ms of waiting for the network" if one.HasField("dead_time") else "nothing is known"
        print(f"  {one.region:<6}{dead}{f' (excluded: {one.excluded})' if one.excluded else ''}")
        for why in one.why:
            print(f"        {why}")


def say_row(title: str, values: list[float], base_s: float) -> None:
    p50 = middle(values)
    print(
        f"{title:<34}{len(values):>6}{ms(p50):>10.1f}{ms(percentile(values, 0.99)):>9.1f}{ms(max(values)):>9.1f}{base_s / p50:>14.2f}x",
        flush=True,
    )


def say_stages(runs: list[SeenRun], wide_s: float, api_s: float) -> list[tuple[str, float]]:
    """Where a run's time went, medians, ms. An event is seen here half a round trip after it happened in the far region."""
    calls = [seconds for seen in runs for _, seconds, _ in seen.steps]
    half_s = wide_s / 2
    took = middle([sum(seconds for _, seconds, _ in seen.steps) for seen in runs])
    rows = [
        ("accepted at home, stored durably", middle([seen.accepted_s for seen in runs])),
        ("on to the runner: half a round trip", half_s),
        ("  and what it takes beyond that", middle([seen.started_s - seen.accepted_s for seen in runs]) - wide_s),
        (f"{CALLS} calls: as long as the API itself takes", CALLS * api_s),
        (f"  what Nearloop adds to them ({ms(middle(calls) - api_s):.2f} ms each)", took - CALLS * api_s),
        ("  between calls, before the first one", middle([seen.steps[-1][2] - seen.started_s for seen in runs]) - took),
        ("the way of the end back: half a round trip", half_s),
        ("  from the last call's end to the result", middle([seen.took_s - seen.steps[-1][2] for seen in runs])),
    ]
    print("\nwhere the time of (c) went, medians, ms")
    for title, seconds in rows:
        print(f"  {title:<52}{ms(seconds):>9.2f}")
    print(f"  {'sum':<52}{ms(sum(seconds for _, seconds in rows)):>9.2f}")
    summary = runs[-1].summary
    if summary is not None:
        print(f"  the summary of the last one: {summary.steps} steps, waited {summary.waited_us / 1e3:.1f} ms for calls, ", end="")
        print(f"saved {summary.saved_us / 1e3:.0f} ms against Execute")
    return rows


async def measure(bench: Bench, options: argparse.Namespace, near: str, far: str) -> dict[str, Any]:
    others = Others()
    progress("waiting until the regions have measured how far everything is")
    await until(bench.is_measured, "the regions have measured their distances", within_s=60.0)
    progress()
    wide_s = middle(await timed(bench.wide_area_s, 10, "the wide area"))
    api_s = middle(await timed(lambda: bench.api_s(near), 100, "the API from iad"))
    far_s = middle(await timed(lambda: bench.api_s(far), 10, "the API from home"))
    print(f"\nmeasured here: home to {FAR} {ms(wide_s):.2f} ms, the API from {FAR} {ms(api_s):.2f} ms, from home {ms(far_s):.2f} ms")
    say_placement(await bench.placed())
    print(f"\n{f'{CALLS} dependent calls':<34}{'times':>6}{'p50 ms':>10}{'p99 ms':>9}{'max ms':>9}{'faster than (a)':>15}")
    own = await timed(lambda: bench.own_calls(far), options.times, "(a)")
    base_s = middle(own)
    say_row("(a) the client calls the API", own, base_s)
    executes = await timed(bench.executes, options.times, "(b)")
    say_row("(b) the client calls Execute", executes, base_s)
    runs: list[SeenRun] = []

    async def one_run() -> None:
        runs.append(await bench.run())

    alone = await timed(one_run, options.runs, "(c)")
    runs = runs[-options.runs :]
    say_row("(c) one run", alone, base_s)
    crowd: list[float] = []
    crowded: list[SeenRun] = []
    for number in range(-1, options.rounds):
        progress(f"(d): {max(number, 0)} of {options.rounds}")
        seen = await asyncio.gather(*(bench.run() for _ in range(options.at_once)))
        if number >= 0:
            crowd += [one.took_s for one in seen]
            crowded += seen
    progress()
    say_row(f"(d) {options.at_once} runs at once", crowd, base_s)
    floor = await timed(lambda: bench.at_the_api(near), options.rounds, "without Nearloop")
    say_row(f"    {options.at_once} programs in {FAR}, no Nearloop", floor, base_s)
    regions = [seen.region for seen in (*runs, *crowded)]
    print(f"\nruns executed in {FAR}: {regions.count(FAR)} of {len(regions)}")
    stages = say_stages(runs, wide_s, api_s)
    print(f"\n{others.line()}")
    limit_s = wide_s + CALLS * api_s + ALLOWANCE_MS / 1000
    print(f"to reach: {ms(wide_s):.1f} + {CALLS} x {ms(api_s):.2f} + {ALLOWANCE_MS:g} = {ms(limit_s):.1f} ms")
    c_s = middle(alone)
    print(Verdict("(c) one run, p50", ms(c_s), ms(limit_s), True, "ms").line())
    print(Verdict(f"(d) {options.at_once} runs at once, p99 / p50 of (c)", percentile(crowd, 0.99) / c_s, SPREAD, True).line())
    print(f"(a) / (c): {base_s / c_s:.1f}   (b) / (c): {middle(executes) / c_s:.1f}")
    times = {"own_calls_s": own, "executes_s": executes, "run_s": alone, "runs_at_once_s": crowd}
    return {"wide_area_s": wide_s, "api_s": api_s, "api_from_home_s": far_s, "stages": dict(stages), **times}


async def play(options: argparse.Namespace, folder: Path) -> int:
    about = say_machine()
    with Parts(folder) as started:
        near_port, far_port = free_port(), free_port()
        ways = ("--way", f"{near_port}:{options.api_ms:g}", "--way", f"{far_port}:{options.api_ms + options.wan_ms:g}")
        api, _ = start_on_port(started, "api", "tests.bench.api_server", *ways)
        for port in (near_port, far_port):
            wait_for_port(api, port)
        near, far = (f"http://127.0.0.1:{port}/next" for port in (near_port, far_port))
        stack: Stack = Stack(
            configuration(near),
            workers=[("tool", FAR), ("run", FAR)],
            triton=False,
            regions=(HOME, FAR),
            wan={FAR: options.wan_ms / 1000},
            extra=home_workers(folder, lambda: stack, near, far),
            on_line=lambda line: print(line, file=sys.stderr) if options.verbose else None,
        )
        async with stack, aiohttp.ClientSession() as session:
            client = Client(stack.gateway_address)
            try:
                found = await measure(Bench(options, stack, client, session), options, near, far)
            finally:
                await client.close()
    if options.json:
        options.json.write_text(json.dumps({"machine": about, **found}, indent=1))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-regions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of half a minute; its numbers mean little")
    parser.add_argument("--wan-ms", type=float, default=80.0, help="round trip between home and iad (80)")
    parser.add_argument("--api-ms", type=float, default=2.0, help="round trip between iad and the API (2)")
    parser.add_argument("--at-once", type=int, default=50, help="runs of (d) at the same moment (50)")
    parser.add_argument("--times", type=int, help="repetitions of (a) and (b) (20)")
    parser.add_argument("--runs", type=int, help="repetitions of (c) (100)")
    parser.add_argument("--rounds", type=int, help="repetitions of (d) (10)")
    parser.add_argument("--verbose", action="store_true", help="what the parts of the stack say, on stderr")
    parser.add_argument("--json", type=Path, help="write everything there", metavar="FILE")
    options = parser.parse_args()
    options.times = options.times or (3 if options.quick else 20)
    options.runs = options.runs or (10 if options.quick else 100)
    options.rounds = options.rounds or (2 if options.quick else 10)
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

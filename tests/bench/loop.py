"""`make bench-loop`: is the model busy while agents wait for their tools?

--agents agent loops at a time: each asks a model in Triton what to do, calls a tool that takes --tool-ms, asks again, and so on --calls
times, until the model answers. The model (models/agent) has one instance that takes 40 ms and 2 ms for each row, at most 16 rows at
once, and no batcher of Triton's: the worker makes its batches, with the default policies. One after the other, on the same stack:

    1 blocking worker     one loop after the other, each call waited for: one step in flight, as many workers as model instances
    16 blocking workers   as many as the model has rows, which is more than a deployment with a worker for each instance has
    64 blocking clients   the client's side has a thread of control for every agent, and drives each call by Execute
    64 runs               the loops run in Nearloop; while one waits for its tool, the model thinks for others

The busy share is Triton's own account: time of executions (compute_infer of batch_stats, which counts a batch once) over wall time. A
model that thinks for one agent at a time is busy as well, so `of full` says how much it did of what executions of 16 rows, one after the
other, could do. Work is queued when more agents wait for the model than fit into an execution; how often that was so is counted at the
client from events.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter as now_s
from typing import Any

import uvloop
from tritonclient.grpc.aio import InferenceServerClient

from gateway.client import NearloopClient
from gateway.config import Config, parse
from gateway.errors import Rejected
from gateway.program.agent import PROTOCOL
from gateway.up import Stack
from nearloop.v1 import gateway_pb2 as pb
from tests.bench.parts import ROOT, BenchError
from tests.bench.run_client import Client, Closed, Others, SeenRun, Verdict, closed, failures, middle, progress, say_machine, until

MODEL, TOOL = "agent", "linger"
INSTANCES, ROWS, FIXED_MS, EACH_MS = 1, 16, 40.0, 2.0  # as in models/agent/config.pbtxt
FULL_PER_S = INSTANCES * ROWS * 1000 / (FIXED_MS + EACH_MS * ROWS)
WORKERS = [("infer", "home"), ("tool", "home"), ("run", "home")]
TARGET = 0.9
SAMPLE_EVERY_S = 0.02
AGAIN_S = 0.05


@dataclass(frozen=True)
class Account:
    """Triton's statistics of the model since it was loaded. busy_s: of all its instances together."""

    at_s: float
    busy_s: float
    executions: int
    rows: int


@dataclass(frozen=True)
class Phase:
    """busy: share of the wall time. queued: share of moments in which more agents waited for the model than an execution takes.
    refused: calls that clients had to repeat."""

    title: str
    busy: float
    rows_each: float
    rows_per_s: float
    loops: Closed[Any]
    queued: float | None = None
    refused: int = 0


class Bench:
    def __init__(self, options: argparse.Namespace, client: Client, steps: NearloopClient, triton: InferenceServerClient) -> None:
        self._options = options
        self._client = client
        self._steps = steps
        self._triton = triton
        self._thinking = 0
        self.refused = 0  # calls that a client had to repeat
        self.program = program(options)
        client.watch = self._watch

    def _watch(self, event: pb.RunEvent) -> None:
        if event.HasField("step_started"):
            self._thinking += is_thought(event.step_started.key)
        elif event.HasField("step_ended"):
            self._thinking -= is_thought(event.step_ended.key)

    async def account(self) -> Account:
        answer = await self._triton.get_inference_statistics(MODEL)
        (found,) = answer.model_stats
        busy_ns = sum(batch.compute_infer.ns for batch in found.batch_stats)
        return Account(now_s(), busy_ns / 1e9, found.execution_count, found.inference_count)

    async def phase(self, title: str, once: Callable[[], Awaitable[Any]], at_once: int, count_queue: bool = False) -> Phase:
        progress(title)
        self.refused = 0
        accounts: list[Account] = []
        queued: list[bool] = []

        async def watch() -> None:
            """Triton's account covers what is measured of the loops: everything is in full swing before, and goes on after it."""
            await asyncio.sleep(self._options.warmup)
            accounts.append(await self.account())
            while now_s() < accounts[0].at_s + self._options.seconds - 0.1:
                await asyncio.sleep(SAMPLE_EVERY_S)
                queued.append(self._thinking > ROWS)
            accounts.append(await self.account())

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            loops = group.create_task(closed(once, at_once, self._options.warmup, self._options.seconds, may_be_empty=True))
        before, after = accounts
        seconds, executions = after.at_s - before.at_s, after.executions - before.executions
        rows = after.rows - before.rows
        busy = (after.busy_s - before.busy_s) / (seconds * INSTANCES)
        waiting = sum(queued) / len(queued) if count_queue else None
        return Phase(title, busy, rows / max(1, executions), rows / seconds, loops.result(), waiting, self.refused)

    async def drive(self) -> None:
        """A loop as its client drives it, one call after the other."""
        messages: list[Any] = [first_message(self._options)]
        tools = [{"name": TOOL, "description": "takes a while"}]
        while True:
            asked = {"protocol": PROTOCOL, "messages": messages, "tools": tools, "remaining": {"iterations": 10, "tokens": 1000}}
            thought = await self._asked("infer", MODEL, asked)
            if "answer" in thought:
                return
            messages.append({"role": "assistant", "calls": thought["calls"]})
            for call in thought["calls"]:
                output = await self._asked("tool", call["tool"], call["input"])
                messages.append({"role": "tool", "call": call["id"], "tool": call["tool"], "output": output})

    async def _asked(self, kind: str, target: str, value: dict[str, Any]) -> Any:
        """A refused call is tried again until it is taken, as a run does it: the loop is not lost."""
        while True:
            try:
                return (await self._steps.execute(kind, target, value)).json
            except Rejected as error:
                self.refused += 1
                await asyncio.sleep(max(AGAIN_S, error.retry_after_s or 0.0) * (0.5 + random.random()))

    async def run(self) -> SeenRun:
        return await self._client.run(self.program)


def first_message(options: argparse.Namespace) -> dict[str, Any]:
    return {"role": "user", "content": "Look it up.", "calls": options.calls, "seconds": options.tool_ms / 1000}


def is_thought(key: str) -> bool:
    """A step's key is `work/2` for the model's third thought, and `work/2/linger.0` for a call that it asked for."""
    return key.count("/") == 1


def program(options: argparse.Namespace) -> str:
    agent = {
        "id": "work",
        "agent": MODEL,
        "messages": [first_message(options)],
        "tools": {TOOL: {"tool": TOOL, "description": "takes a while"}},
        "budget": {"iterations": options.calls + 2},
    }
    return json.dumps({"program": "nearloop/v1", "name": "agent", "steps": [agent], "output": "${steps.work.output.answer}"})


def configuration(folder: Path) -> Config:
    return parse(
        {
            "gateway": {"listen": "127.0.0.1:0"},
            "auth": {"anonymous_tenant": "bench"},
            "triton": {"repository": str(folder)},
            "tools": {"modules": ["tests.bench.soak_tool"]},
        }
    )


def line(phase: Phase, base: Phase) -> str:
    loops, rate = phase.loops, phase.loops.per_s
    model = f"{phase.busy:>8.1%}{phase.rows_each:>10.1f}{phase.rows_per_s:>9.0f}{phase.rows_per_s / FULL_PER_S:>9.0%}"
    queued = "" if phase.queued is None else f"{phase.queued:.0%}"
    beside = f"{rate:>10.2f}{rate / base.loops.per_s:>9.1f}x"
    return (
        f"{phase.title:<22}{model}{beside}{loops.ms(0.5):>10.0f}{loops.ms(0.99):>9.0f}{queued:>8}{phase.refused or '':>9}{failures(loops)}"
    )


def stages(runs: list[SeenRun], calls: int) -> None:
    """What the steps of a run took, and what is left for everything between them."""
    think = [seconds for seen in runs for key, seconds, _ in seen.steps if is_thought(key)]
    tool = [seconds for seen in runs for key, seconds, _ in seen.steps if not is_thought(key)]
    rest = [seen.took_s - sum(seconds for _, seconds, _ in seen.steps) for seen in runs if len(seen.steps) == 2 * calls + 1]
    print("\nmedians in a run, ms: ", end="")
    print(f"a thought with its queue {1000 * middle(think):.0f}, a tool call {1000 * middle(tool):.1f}, ", end="")
    print(f"all that is no step {1000 * middle(rest):.1f}")


async def play(options: argparse.Namespace, folder: Path) -> int:
    about = say_machine()
    shutil.copytree(Path(__file__).parent / "models" / MODEL, folder / MODEL, ignore=shutil.ignore_patterns("__pycache__"))
    os.environ["PYTHONPATH"] = str(ROOT)  # for the tool worker, which imports the tool from this package
    async with Stack(configuration(folder), workers=WORKERS) as stack:
        client, steps = Client(stack.gateway_address), NearloopClient(stack.gateway_address, throttle=None)
        triton = InferenceServerClient(stack.config.triton.addresses[0])
        try:
            bench = Bench(options, client, steps, triton)

            async def ends() -> bool:
                steps: int = 2 * options.calls + 1
                return len((await bench.run()).steps) == steps

            await until(ends, "a first run")
            phases = []
            columns = (
                ("busy", 8),
                ("rows each", 10),
                ("rows/s", 9),
                ("of full", 9),
                ("loops/s", 10),
                ("beside", 10),
                ("p50 ms", 10),
                ("p99 ms", 9),
            )
            print(f"\n{'':<22}{''.join(f'{title:>{width}}' for title, width in columns)}{'queued':>8}{'refused':>9}", flush=True)
            many = options.agents
            plans = [
                (f"{INSTANCES} blocking worker", bench.drive, INSTANCES),
                (f"{ROWS} blocking workers", bench.drive, ROWS),
                (f"{many} blocking clients", bench.drive, many),
                (f"{many} runs", bench.run, many),
            ]
            others = Others()
            for title, once, at_once in plans:
                phases.append(await bench.phase(title, once, at_once, count_queue=once == bench.run))
                progress()
                print(line(phases[-1], phases[0]), flush=True)
            noise = others.line()
        finally:
            await client.close()
            await steps.close()
            await triton.close()
    base, runs = phases[0], phases[-1]
    stages(runs.loops.results, options.calls)
    print(f"\n{noise}")
    print(Verdict("Triton busy while work is queued, %", 100 * runs.busy, 100 * TARGET, False, "%").line())
    share, rows = runs.rows_per_s / FULL_PER_S, runs.rows_each
    print(f"of what full executions could do: {share:.0%}, with {rows:.1f} of {ROWS} rows in each: busy with small ones is not full use")
    print(f"loops a second, runs / one blocking worker for each instance: {runs.loops.per_s / base.loops.per_s:.1f}")
    if options.json:
        shown = [
            {
                "what": phase.title,
                "busy": phase.busy,
                "queued": phase.queued,
                "rows_each": phase.rows_each,
                "loops_per_s": phase.loops.per_s,
                "p50_ms": phase.loops.ms(0.5),
                "p99_ms": phase.loops.ms(0.99),
                "refused": phase.refused,
                "failed": phase.loops.failed,
            }
            for phase in phases
        ]
        options.json.write_text(json.dumps({"machine": about, "phases": shown}, indent=1))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of half a minute; its numbers mean little")
    parser.add_argument("--agents", type=int, default=64, help="loops at a time (64)")
    parser.add_argument("--calls", type=int, default=3, help="of the tool in each loop (3)")
    parser.add_argument("--tool-ms", type=float, default=100.0, help="what the tool takes (100)")
    parser.add_argument("--seconds", type=float, help="length of a measurement after its warm-up (20)")
    parser.add_argument("--warmup", type=float, help="seconds before each measurement (5)")
    parser.add_argument("--json", type=Path, help="write everything there", metavar="FILE")
    options = parser.parse_args()
    options.seconds = options.seconds or (5.0 if options.quick else 20.0)
    options.warmup = options.warmup or (2.0 if options.quick else 5.0)
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

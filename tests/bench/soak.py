"""Ten thousand steps in flight on five hundred sessions, for minutes: is memory flat, are credits honoured, is nothing lost?

    python -m tests.bench.soak --minutes 10

Real parts: nats-server, a gateway, a worker with a tool that sleeps 8 to 10 s, and the clients in a process of their own. One session in
twenty stops to read for two minutes and goes on; another one in twenty uses all its credits and sends more. Every 10 s a line; then the
sum. Ends with 1 when an accepted step was not answered exactly once, a credit was not honoured, or memory is not flat.

Memory is flat when the straight line through what was seen after the warm-up (least squares) grows by less than FLAT of its mean over the
whole run, for the gateway and for the worker.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from gateway.addresses import free_port
from tests.bench.parts import BenchError, Part, Parts, wait_for_port

FLAT = 0.05
PRINT_S = 10.0
STALL_S = 120.0
WINDOW = 24  # credits of a session at most
LEAST_S, MOST_S = 8.0, 10.0

CONFIG = """
[gateway]
listen = "127.0.0.1:{port}"
[auth]
anonymous_tenant = "soak"
[nats]
urls = ["{url}"]
ack_wait_s = 60
result_keep_s = 30
[tools]
modules = ["tests.bench.soak_tool"]
slots = 15000
[[targets]]
kind = "tool"
name = "linger"
slots = 15000
timeout_s = 120
[[policies]]
use = "token_bucket"
rate_per_s = 1000000
burst = 1000000
[[policies]]
use = "fixed_limit"
limit = 15000
[[policies]]
use = "bounded_wait"
max_waiting = 20000
max_wait_s = 60
[[policies]]
use = "breakwater"
initial_credits = 15000
max_credits = 20000
idle_window = 8
max_window = {window}
[[policies]]
use = "nearest_region"
[[policies]]
use = "passthrough"
[[policies]]
use = "parent_ratio"
"""


def rss_mb(part: Part) -> float:
    try:
        return float(psutil.Process(part.process.pid).memory_info().rss) / 2**20
    except psutil.NoSuchProcess:
        return float("nan")


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line through (x, y), least squares; 0 for fewer than two points."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / max(1, n), sum(y for _, y in points) / max(1, n)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def is_flat(points: list[tuple[float, float]]) -> bool:
    """(minutes, MB)."""
    mean = sum(mb for _, mb in points) / len(points)
    return abs(slope(points)) * (points[-1][0] - points[0][0]) < FLAT * mean


def read(client: Part) -> dict[str, Any]:
    assert client.process.stdout is not None
    line = client.process.stdout.readline()
    if not line:
        client.process.wait(10)
        client.check()
        raise BenchError("the clients ended without a sum")
    answer: dict[str, Any] = json.loads(line)
    return answer


def start(parts: Parts) -> tuple[Part, Part, str]:
    nats_server, url = parts.start_nats_server()
    port = free_port()
    config = parts.folder / "soak.toml"
    config.write_text(CONFIG.format(port=port, url=url, window=WINDOW))
    where = ("--config", str(config))
    worker = parts.start_module("worker", "workers.serve", "--kind", "tool", "--region", "home", *where)
    gateway = parts.start_module("gateway", "gateway.cli", "gateway", *where)
    wait_for_port(gateway, port, 60)
    nats_server.check()
    return gateway, worker, f"127.0.0.1:{port}"


def soak(options: argparse.Namespace, folder: Path) -> int:
    seconds = options.minutes * 60
    with Parts(folder) as parts:
        gateway, worker, address = start(parts)
        time.sleep(3)  # until the worker's first heartbeats
        client = parts.start_module("client", "tests.bench.soak_client")
        share = options.sessions // 20
        job = {
            "address": address,
            "sessions": options.sessions,
            "in_flight": options.in_flight,
            "seconds": seconds,
            "least_s": LEAST_S,
            "most_s": MOST_S,
            "stall_s": min(STALL_S, seconds / 3),
            "stalled": share,
            "greedy": share,
            "window": WINDOW,
            "print_s": PRINT_S,
        }
        assert client.process.stdin is not None
        client.process.stdin.write(json.dumps(job) + "\n")
        client.process.stdin.flush()
        print(f"{options.sessions} sessions, {options.in_flight} steps each, {share} stalled readers, {share} that overdraw")
        print(
            f"{'s':>5} {'in flight':>9} {'done/s':>7} {'gateway MB':>10} {'worker MB':>9} {'violations':>10} {'overdraws told':>14}",
            flush=True,
        )
        warm_s = min(90.0, max(40.0, seconds / 5))
        began_s = last_s = time.monotonic()
        last_done, seen = 0, {"gateway": [(0.0, rss_mb(gateway))], "worker": [(0.0, rss_mb(worker))]}
        steady: dict[str, list[tuple[float, float]]] = {"gateway": [], "worker": []}
        while True:
            line = read(client)
            for part in (gateway, worker):
                part.check()
            if line.get("end"):
                line["log"] = [text for text in gateway.log.read_text(errors="replace").splitlines() if "policy " in text]
                break
            now_s = time.monotonic()
            at_s, rate = now_s - began_s, (line["done"] - last_done) / (now_s - last_s)
            last_s, last_done = now_s, line["done"]
            for name, part in (("gateway", gateway), ("worker", worker)):
                seen[name].append((at_s / 60, rss_mb(part)))
                if warm_s < at_s < seconds:
                    steady[name].append(seen[name][-1])
            print(
                f"{at_s:5.0f} {line['in_flight']:9,} {rate:7,.0f} {seen['gateway'][-1][1]:10.1f} {seen['worker'][-1][1]:9.1f}"
                f" {line['violations']:10} {line['told']:14,}",
                flush=True,
            )
    return summary(line, seen, steady)


def summary(line: dict[str, Any], seen: dict[str, list[tuple[float, float]]], steady: dict[str, list[tuple[float, float]]]) -> int:
    good = line["taken"] == line["answered"] and not (line["lost"] or line["twice"] or line["unknown"] or line["wrong"])
    print(f"\nsteps: {line['taken']:,} accepted, {line['answered']:,} answered, {line['done']:,} of them done")
    print(f"other ends: {line['failures'] or 'none'}")
    print(f"lost {line['lost']}, answered twice {line['twice']}, unknown {line['unknown']}, of another step {line['wrong']}")
    print(f"credits: {line['violations']} violations; {line['told']:,} overdraws, all told and none executed")
    print(f"readers stalled {line['stalls']} times; sessions ended: {line['ended']}")
    for text in line["log"][:3]:
        print(f"gateway's log: {text}")
    print(f"on top of the tool's sleep: p50 {line['p50_ms']:,.0f} ms, p99 {line['p99_ms']:,.0f} ms")
    flat = True
    for name, points in steady.items():
        if len(points) < 3:
            print(f"{name}: too few readings after the warm-up for a verdict")
            flat = False
            continue
        flat &= is_flat(points)
        highest = max(mb for _, mb in seen[name])
        verdict = "flat" if is_flat(points) else "NOT flat"
        print(f"{name}: {seen[name][0][1]:.0f} MB at the start, {highest:.0f} MB at most")
        print(f"{name}: {slope(points):+.2f} MB/min after the warm-up: {verdict}")
    fine = good and flat and not line["violations"] and set(line["ended"]) == {"StatusCode.OK"}
    print("PASS" if fine else "FAIL")
    return 0 if fine else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="sessions under load, for minutes")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--in-flight", type=int, default=20, help="steps of each session")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nearloop-soak-"))
    try:
        return soak(options, folder)
    except BenchError as error:
        print(f"could not be measured: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

"""What the demo shows: a live table of agents, their answers, where the time went, and where to look further."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gateway.demo.agent import Answer
from gateway.demo.backend import Ledger
from gateway.demo.loop import ORIGIN, Both

MOST_REASONS = 3  # of a placement, for each region; the largest come first


@dataclass(slots=True)
class Row:
    """An agent as the live table shows it."""

    question: str
    calls: int = 0
    doing: str = "waiting"


class View:
    """Use as a context manager while agents run. Without a terminal each event is one line."""

    def __init__(self, console: Console, questions: Sequence[str]) -> None:
        self._console = console
        self._rows = [Row(question) for question in questions]
        self._live = Live(self._table(), console=console, refresh_per_second=8, transient=True) if console.is_terminal else None

    def __enter__(self) -> "View":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def event(self, agent: int, kind: str, detail: str) -> None:
        row = self._rows[agent]
        row.calls += kind != "answer"
        row.doing = f"{kind}: {detail}"
        if self._live:
            self._live.update(self._table())
        else:
            self._console.print(f"  agent {agent + 1}  {row.doing}", highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2), expand=True)
        for name, width in (("agent", 6), ("question", None), ("calls", 6), ("now", None)):
            table.add_column(name, width=width, no_wrap=True, overflow="ellipsis", ratio=None if width else 1)
        for number, row in enumerate(self._rows, 1):
            table.add_row(str(number), row.question, str(row.calls), Text(row.doing))
        return table


def show_answers(console: Console, answers: Sequence[Answer]) -> None:
    for answer in answers:
        lines = [Text(answer.answer)]
        lines += [Text(f"evidence: {line}", style="dim") for line in answer.evidence]
        lines.append(Text(f"score {answer.score:.2f}, {answer.iterations} iterations, {len(answer.calls)} calls", style="dim"))
        console.print(Panel(Group(*lines), title=Text(answer.question, style="bold"), title_align="left"))


def show_times(console: Console, ledger: Ledger, wall_s: float, agents: int) -> None:
    """Where the time went, for each target: mean milliseconds of each part of a step, and its share of all time."""
    who = "1 agent" if agents == 1 else f"{agents} agents at once"
    table = Table(title=f"Where the time went, mean milliseconds a step ({who}, {wall_s:.1f} s)", title_justify="left")
    for name in ("target @ region", "steps", "admission", "queue", "network", "service", "total", "share"):
        table.add_column(name, justify="left" if name.startswith("target") else "right")
    everything_us = sum(spent.total_us for spent in ledger.by_target.values()) or 1
    for name, spent in sorted(ledger.by_target.items(), key=lambda item: -item[1].total_us):
        parts = (spent.admission_us, spent.queue_us, spent.network_us, spent.service_us, spent.total_us)
        means = [f"{part / spent.steps / 1000:.2f}" for part in parts]
        table.add_row(name, str(spent.steps), *means, f"{100 * spent.total_us / everything_us:.0f} %")
    console.print(table)


def show_both(console: Console, both: Both) -> None:
    """One question by the client and as a run, call by call, and what that saved."""
    client, run, placement = both.by_client, both.as_run, both.placement
    region = run.summary.region if run.summary else ""
    console.print("Where it would waste the least time, by measured round trips (`nearloop place`):", highlight=False)
    places = Table(box=None, padding=(0, 2))
    for name in ("region", "expected dead time", "why"):
        places.add_column(name)
    for one in placement.estimates:
        chosen = " *" if one.region == placement.region else ""
        why = one.excluded or "\n".join(one.why[:MOST_REASONS])
        places.add_row(f"{one.region}{chosen}", f"{one.dead_s * 1000:.0f} ms" if math.isfinite(one.dead_s) else "not known", Text(why))
    console.print(places)
    console.print(Text(f"\nMilliseconds after which the client in {ORIGIN} has heard of each call (medians of three, in turn):"))
    table = Table()
    table.add_column("call")
    table.add_column("driven by the client", justify="right")
    table.add_column(f"one run in {region}", justify="right")
    for here, there in zip_longest(client.calls, run.calls):
        what = here.what if here and (not there or here.what == there.what) else f"{here.what if here else '-'} / {there.what}"
        table.add_row(what, *(f"{one.at_s * 1000:.0f}" if one else "" for one in (here, there)))
    table.add_section()
    table.add_row("the whole loop", *(Text(f"{one.wall_s * 1000:.0f}", style="bold") for one in (client, run)))
    table.add_row("calls", str(len(client.calls)), str(len(run.calls)))
    table.add_row("round trips between the regions", str(client.crossings), str(run.crossings))
    console.print(table)
    estimated_ms = run.summary.saved_us / 1000 if run.summary else 0.0
    saved_ms = (client.wall_s - run.wall_s) * 1000
    console.print(Text(f"Both answered: {client.answer['name'] or client.answer['answer']}"))
    console.print(Text(f"Dead time saved: {saved_ms:.0f} ms as measured here, {estimated_ms:.0f} ms by the summary of the run"))


def show_further(console: Console, nats_url_file: Path, gateway_address: str, program: Path) -> None:
    console.print(
        Text(
            "\nLook further, while it runs (this demo with --keep):\n"
            f'  export NATS_URL="$(cat {nats_url_file})" NEARLOOP_ADDRESS={gateway_address}\n'
            "  nats stream ls\n"
            "  nats stream subjects NL_RUNS\n"
            "  nats --js-domain iad consumer report NL_STEPS_IAD\n"
            "  nats sub 'nl.step.>'\n"
            "  nats service ls\n"
            "  nats kv get nl-regions link.home.iad --raw\n"
            f"  grpcurl -plaintext {gateway_address} list\n"
            f'  nearloop run {program} --input \'{{"question": "how do I copy a file?"}}\'\n'
            "  nearloop targets\n"
            "  nearloop doctor"
        ),
        soft_wrap=True,
    )


def make_console() -> Console:
    """Wide enough for the tables where there is no terminal that says how wide it is."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=120)

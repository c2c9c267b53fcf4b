"""What the demo shows: a live table of agents, their answers, where the time went, and where to look further."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gateway.demo.agent import Answer
from gateway.demo.backend import Ledger


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


def show_further(console: Console, nats_url_file: Path, gateway_address: str) -> None:
    console.print(
        Text(
            "\nLook further, while it runs (`nearloop up`, or this demo with --keep):\n"
            f'  export NATS_URL="$(cat {nats_url_file})"\n'
            "  nats stream ls\n"
            "  nats stream subjects NL_RESULTS\n"
            "  nats consumer report NL_STEPS_HOME\n"
            "  nats sub 'nl.step.>'\n"
            "  nats service ls\n"
            "  nats kv ls nl-targets\n"
            f"  grpcurl -plaintext {gateway_address} list\n"
            f"  nearloop targets --address {gateway_address}\n"
            f"  nearloop doctor --address {gateway_address}"
        )
    )


def make_console() -> Console:
    """Wide enough for the tables where there is no terminal that says how wide it is."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=120)

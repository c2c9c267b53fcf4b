"""How runs and placements are shown: the output on stdout, what happens on stderr; or everything as JSON lines on stdout."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer

from gateway.cli_common import terminal_width
from gateway.cli_output import time_text
from gateway.client_run_values import ClientRun, RunItem, RunOutput, RunStarted
from gateway.run_types import Placement, StepEnded, StepStarted, StepToken, Summary

_NAMES: Mapping[type[RunItem], str] = {
    ClientRun: "accepted",
    RunStarted: "started",
    StepStarted: "step_started",
    StepEnded: "step_ended",
    StepToken: "token",
    Summary: "summary",
    RunOutput: "result",
}
_LONGEST_SHOWN = 100  # characters of a step's output


class Live:
    """Shows the items of a run as they come. quiet: only its output and its summary."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._run_id = ""
        self._speaks = ""  # key of the step whose tokens are on an open line

    def show(self, item: RunItem) -> None:
        if isinstance(item, ClientRun):
            self._run_id = item.id
        if self._quiet and not isinstance(item, Summary | RunOutput):
            return
        if self._as_json:
            _line({"event": _NAMES[type(item)]} | (_run(item) if isinstance(item, ClientRun) else asdict(item)))
        elif isinstance(item, StepToken):
            self._token(item)
        elif isinstance(item, RunOutput):
            self.end_line()
            _value(item.output)
        else:
            self._say(_sentence(item))

    def _token(self, item: StepToken) -> None:
        """Pieces of one step on one line, as long as no other event comes between."""
        if self._speaks != item.key:
            self.end_line()
            typer.echo(f"{_indent(item.key)}{item.key}: ", nl=False, err=True)
            self._speaks = item.key
        typer.echo(item.text, nl=False, err=True)

    def left(self) -> None:
        """The person stops watching."""
        if self._run_id:
            self._say(f"the run goes on: `nearloop runs watch {self._run_id}` follows it, `nearloop runs cancel {self._run_id}` ends it")

    def end_line(self) -> None:
        if self._speaks:
            typer.echo(err=True)
            self._speaks = ""

    def _say(self, text: str) -> None:
        self.end_line()
        typer.echo(text, err=True)


def show_submitted(run: ClientRun, as_json: bool) -> None:
    """The id alone on stdout, for scripts."""
    if as_json:
        return _line(_run(run) | {"created": run.created})
    typer.echo(run.id)
    return typer.echo(f"{'accepted' if run.created else 'was there already'}, {run.state.value}, in {run.region}", err=True)


def show_run(run: ClientRun, as_json: bool) -> None:
    if as_json:
        return _line(_run(run))
    typer.echo(f"{run.id} is {run.state.value}: {run.program}, lane {run.lane.value}, region {run.region}", err=True)
    for step in run.steps:
        shown = f"{step.size_bytes} bytes" if step.size_bytes else _short(step.output)
        typer.echo(f"{_indent(step.key)}{step.key} {shown}", err=True)
    if run.result is not None:
        _value(run.result.output)
    if run.failure is not None:
        typer.echo(f"{run.failure.code} {run.failure.reason}: {run.failure.message}", err=True)
    return None


def show_placement(placement: Placement, as_json: bool) -> None:
    if as_json:
        return _line(_placement(placement))
    from rich.console import Console
    from rich.table import Table

    table = Table("region", "dead time", "why", box=None, pad_edge=False)
    for one in placement.estimates:
        best = " *" if one.region == placement.region else ""
        why = "; ".join([*([f"excluded: {one.excluded}"] if one.excluded else []), *one.why])
        table.add_row(f"{one.region}{best}", _seconds(one.dead_s), why.replace("[", "\\["))
    Console(width=terminal_width()).print(table, highlight=False)
    if not placement.region:
        typer.echo("no region can be chosen", err=True)
    return None


def _sentence(item: ClientRun | RunStarted | StepStarted | StepEnded | Summary) -> str:
    if isinstance(item, ClientRun):
        return _accepted(item)
    if isinstance(item, StepEnded):
        return f"{_indent(item.key)}{item.key} {_outcome(item)}"
    if isinstance(item, Summary):
        return _summary(item)
    again = f", attempt {item.attempt}" if item.attempt > 1 else ""
    if isinstance(item, RunStarted):
        return f"started in {item.region} by {item.worker}{again}"
    return f"{_indent(item.key)}{item.key} -> {item.kind}.{item.target}{again}"


def _accepted(run: ClientRun) -> str:
    estimates = run.placement.estimates if run.placement else ()
    expected = next((f", {_seconds(one.dead_s)} of waiting expected" for one in estimates if one.region == run.region), "")
    return f"{run.id} accepted: {run.program} in {run.region}{expected}"


def _outcome(step: StepEnded) -> str:
    marks = "".join([", replayed" * step.replayed, ", speculated" * step.speculated])
    where = f" in {step.region}" if step.region else ""
    if step.code or step.reason:
        return f"failed{where} after {step.took_us / 1e3:.1f} ms{marks}: {step.code} {step.reason}: {step.message}"
    shown = f"{step.size_bytes} bytes" if step.size_bytes else _short(step.output)
    return f"done{where} after {step.took_us / 1e3:.1f} ms{marks}: {shown}"


def _summary(s: Summary) -> str:
    guesses = f", {s.guesses} guessed and {s.wrong_guesses} of them in vain" if s.guesses else ""
    saved = f", {s.saved_us / 1e6:.3f} s saved" if s.saved_us else ""
    return f"{s.steps} steps in {s.region}{guesses}: {s.waited_us / 1e6:.3f} s of dead time waited{saved}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def _indent(key: str) -> str:
    """Two spaces, and two more for each map and loop around the step."""
    return "  " * (1 + key.count("/"))


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if math.isfinite(seconds) else "not known"


def _value(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _line(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _run(run: ClientRun) -> dict[str, Any]:
    failure = run.failure
    return {
        "id": run.id,
        "state": run.state.value,
        "program": run.program,
        "region": run.region,
        "lane": run.lane.value,
        "create_time": time_text(run.created_s),
        "expire_time": time_text(run.expires_s),
        "steps": [asdict(step) for step in run.steps],
        "result": asdict(run.result) if run.result is not None else None,
        "failure": {"code": failure.code, "reason": failure.reason, "message": failure.message} if failure is not None else None,
        "placement": _placement(run.placement) if run.placement is not None else None,
    }


def _placement(placement: Placement) -> dict[str, Any]:
    estimates = [
        {
            "region": one.region,
            "dead_s": one.dead_s if math.isfinite(one.dead_s) else None,
            "why": list(one.why),
            "excluded": one.excluded,
        }
        for one in placement.estimates
    ]
    return {"region": placement.region, "estimates": estimates}

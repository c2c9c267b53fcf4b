"""How results, events, jobs and targets are shown: the output on stdout, the rest on stderr; or everything as JSON lines on stdout."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer

from gateway.cli_common import terminal_width
from gateway.types import JSON, BatchCost, EventKind, Payload, StepEvent, TargetStatus

if TYPE_CHECKING:
    from gateway.client import ClientJob, ClientResult


def show_result(result: "ClientResult", as_json: bool) -> None:
    if as_json:
        _line({"event": "result"} | _result(result))
        return
    _show_payload(result.payload)
    t = result.timing
    typer.echo(
        f"{result.step_id} in {result.region} by {result.worker}, attempt {result.attempt}: admission {t.admission_us} us, "
        f"queue {t.queue_us} us, network {t.network_us} us, service {t.service_us} us",
        err=True,
    )


def show_item(item: "StepEvent | ClientResult", as_json: bool) -> None:
    """An item of a stream. Tokens are written as they come, without line ends."""
    if not isinstance(item, StepEvent):
        show_result(item, as_json)
    elif as_json:
        _line(_event(item))
    elif item.kind is EventKind.STARTED:
        typer.echo(f"started in {item.region} by {item.worker}, attempt {item.attempt}", err=True)
    elif item.kind is EventKind.PROGRESS:
        typer.echo(f"{item.fraction:4.0%} {item.message}", err=True)
    elif item.payload is not None:
        _show_payload(item.payload)


def show_job(job: "ClientJob", as_json: bool) -> None:
    if as_json:
        _line(_job(job))
        return
    typer.echo(f"{job.id} is {job.state.value}: {job.kind.value} {job.target}, lane {job.lane.value}, region {job.region}", err=True)
    if job.result is not None:
        show_result(job.result, as_json)
    if job.failure is not None:
        typer.echo(f"{job.failure.code} {job.failure.reason}: {job.failure.message}", err=True)


def show_submitted(job: "ClientJob", as_json: bool) -> None:
    """The id alone on stdout, for scripts."""
    if as_json:
        _line(_job(job) | {"created": job.created})
        return
    typer.echo(job.id)
    typer.echo(f"{'stored' if job.created else 'was there already'}, {job.state.value}", err=True)


def show_targets(targets: Sequence[TargetStatus], as_json: bool) -> None:
    if as_json:
        for status in targets:
            _line(_target(status))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "target", "home", "live in", box=None, pad_edge=False)
    with_costs = any(status.batch_cost is not None for status in targets)
    if with_costs:
        table.add_column("batch cost")
    table.add_column("description")
    for status in targets:
        target = status.target
        live = ", ".join(status.live_regions) or "nowhere"
        costs = [_cost(status.batch_cost)] if with_costs else []
        table.add_row(target.kind.value, target.name, target.home_region, live, *costs, target.description.replace("[", "\\["))
    Console(width=terminal_width()).print(table, highlight=False)


def _cost(cost: BatchCost | None) -> str:
    return f"{cost.fixed_s * 1e3:.1f} ms + {cost.each_s * 1e3:.1f} ms each" if cost is not None else ""


def _show_payload(payload: Payload) -> None:
    if payload.content_type.partition(";")[0] == JSON:
        typer.echo(json.dumps(json.loads(payload.data), indent=2, ensure_ascii=False))
    elif payload.content_type.startswith("text/"):
        typer.echo(payload.data.decode(errors="replace"))
    else:
        typer.echo(f"{len(payload.data)} bytes of {payload.content_type}; --json shows them in base64", err=True)


def _line(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, default=dict))


def _payload(payload: Payload) -> dict[str, Any]:
    if payload.content_type.partition(";")[0] == JSON:
        return {"output": json.loads(payload.data)}
    if payload.content_type.startswith("text/"):
        return {"output": payload.data.decode(errors="replace"), "content_type": payload.content_type}
    import base64

    return {"output_base64": base64.b64encode(payload.data).decode(), "content_type": payload.content_type}


def _result(result: "ClientResult") -> dict[str, Any]:
    t = result.timing
    return {
        "step_id": result.step_id,
        **_payload(result.payload),
        "attempt": result.attempt,
        "region": result.region,
        "worker": result.worker,
        "timing": {"admission_us": t.admission_us, "queue_us": t.queue_us, "network_us": t.network_us, "service_us": t.service_us},
    }


def _event(event: StepEvent) -> dict[str, Any]:
    shown: dict[str, Any] = {"event": event.kind.value, "attempt": event.attempt, "sequence": event.sequence}
    if event.kind is EventKind.STARTED:
        shown |= {"region": event.region, "worker": event.worker}
    elif event.kind is EventKind.PROGRESS:
        shown |= {"fraction": event.fraction, "message": event.message}
    elif event.payload is not None:
        shown |= _payload(event.payload)
    return shown


def _job(job: "ClientJob") -> dict[str, Any]:
    failure = job.failure
    return {
        "id": job.id,
        "state": job.state.value,
        "kind": job.kind.value,
        "target": job.target,
        "lane": job.lane.value,
        "region": job.region,
        "create_time": time_text(job.created_s),
        "expire_time": time_text(job.expires_s),
        "result": _result(job.result) if job.result is not None else None,
        "failure": {"code": failure.code, "reason": failure.reason, "message": failure.message} if failure is not None else None,
    }


def _target(status: TargetStatus) -> dict[str, Any]:
    target = status.target
    return {
        "kind": target.kind.value,
        "name": target.name,
        "description": target.description,
        "home_region": target.home_region,
        "live_regions": list(status.live_regions),
        "timeout_s": target.timeout_s,
        "read_only": target.read_only,
        "idempotent": target.idempotent,
        "input_schema": target.input_schema,
        "tensor_inputs": [[spec.name, spec.datatype, list(spec.shape)] for spec in target.tensor_inputs],
        "tensor_outputs": [[spec.name, spec.datatype, list(spec.shape)] for spec in target.tensor_outputs],
        "batch_cost": asdict(status.batch_cost) if status.batch_cost is not None else None,
    }


def time_text(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")

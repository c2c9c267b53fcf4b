"""nearloop execute, submit, get, watch, cancel, targets: the client's side of the command line.

Outputs go to stdout, where the time went to stderr, so that `nearloop execute ... | jq` works.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway import addresses, cli_output
from gateway.cli_common import DEFAULT_ADDRESS, Address, run_async
from gateway.errors import Unavailable
from gateway.types import Kind, Lane, Payload

if TYPE_CHECKING:
    from gateway.client import NearloopClient

ApiKey = Annotated[str, typer.Option("--api-key", envvar="NEARLOOP_API_KEY", show_default=False, help="Better in NEARLOOP_API_KEY.")]
KindArgument = Annotated[Kind, typer.Argument(help="What executes the step.")]
TargetArgument = Annotated[str, typer.Argument(help="Name of the model, tool or collection: see `nearloop targets`.")]
Input = Annotated[str, typer.Option("--input", metavar="JSON|@FILE|-", help="The step's input; `-` reads it from stdin.")]
LaneOption = Annotated[Lane, typer.Option("--lane", help="Priority tier.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, metavar="SECONDS", help="For the whole step.")]
Key = Annotated[str, typer.Option("--key", help="Idempotency key: makes the step durable and repeatable.")]
Run = Annotated[str, typer.Option("--run", help="The run that it belongs to.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything as JSON, one line for each answer or event.")]
JobId = Annotated[str, typer.Argument(help="Id of the job, as `nearloop submit` printed it.")]
_CONNECT_WITHIN_S = 5.0


def register(app: typer.Typer) -> None:
    execute_example = """Example: `nearloop execute tool echo --input '{"hello": "world"}'`"""
    app.command(epilog=execute_example)(execute)
    app.command(epilog="Example: `nearloop submit tool echo --input @order.json --key order-1`")(submit)
    app.command(epilog="Example: `nearloop get home-0123456789abcdef0123456789abcdef`")(get)
    app.command(epilog="Example: `nearloop watch home-0123456789abcdef0123456789abcdef`")(watch)
    app.command(epilog="Example: `nearloop cancel home-0123456789abcdef0123456789abcdef`")(cancel)
    app.command(epilog="Example: `nearloop targets --kind tool`")(targets)


def read_input(text: str) -> Payload:
    """The JSON as it was written, so that no number changes. Raises BadParameter."""
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text()
        json.loads(text)
    except OSError as error:
        raise typer.BadParameter(f"--input: {text[1:]} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(f"--input is not JSON: {error}") from None
    return Payload(text.encode())


def with_client(address: str, api_key: str, use: Callable[["NearloopClient"], Awaitable[None]]) -> None:
    """Runs `use` with a client for the gateway at the address."""
    try:
        host, port = addresses.split(address)
    except ValueError as error:
        raise typer.BadParameter(f"--address: {error}") from None

    async def main() -> int:
        await _look(host, port, address)
        from gateway.client import NearloopClient

        async with NearloopClient(address, api_key=api_key or None) as client:
            await use(client)
        return 0

    run_async(main)


async def _look(host: str, port: int, address: str) -> None:
    """A person hears at once that nothing listens there; the client would try for a while. Raises Unavailable."""
    try:
        async with asyncio.timeout(_CONNECT_WITHIN_S):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
    except (OSError, TimeoutError):
        raise Unavailable(
            f"no gateway answers at {address}: start one with `nearloop up`, or name it with --address", reason="GATEWAY_UNREACHABLE"
        ) from None


def _step_options(lane: Lane, timeout_s: float, key: str, run: str) -> dict[str, Any]:
    return {"lane": lane, "timeout_s": timeout_s, "idempotency_key": key, "run": run}


def execute(
    kind: KindArgument,
    target: TargetArgument,
    text: Input = "{}",
    stream: Annotated[bool, typer.Option("--stream", help="Show tokens and progress as they come.")] = False,
    lane: LaneOption = Lane.INTERACTIVE,
    timeout_s: Timeout = 30.0,
    key: Key = "",
    run: Run = "",
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = "",
) -> None:
    """Run one step and print its output."""
    body, options = read_input(text), _step_options(lane, timeout_s, key, run)

    async def use(client: "NearloopClient") -> None:
        if not stream:
            cli_output.show_result(await client.execute(kind, target, body, **options), as_json)
            return
        async with aclosing(client.stream(kind, target, body, **options)) as items:
            async for item in items:
                cli_output.show_item(item, as_json)

    with_client(address, api_key, use)


def submit(
    kind: KindArgument,
    target: TargetArgument,
    text: Input = "{}",
    lane: LaneOption = Lane.STANDARD,
    timeout_s: Timeout = 3600.0,
    key: Key = "",
    run: Run = "",
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = "",
) -> None:
    """Store a step and print its job's id once it is durable. The same key again is the same job."""
    body, options = read_input(text), _step_options(lane, timeout_s, key, run)

    async def use(client: "NearloopClient") -> None:
        cli_output.show_submitted(await client.submit(kind, target, body, **options), as_json)

    with_client(address, api_key, use)


def get(job_id: JobId, as_json: AsJson = False, address: Address = DEFAULT_ADDRESS, api_key: ApiKey = "") -> None:
    """Print where a job stands, and its output when it has ended."""

    async def use(client: "NearloopClient") -> None:
        cli_output.show_job(await client.get_job(job_id), as_json)

    with_client(address, api_key, use)


def watch(job_id: JobId, as_json: AsJson = False, address: Address = DEFAULT_ADDRESS, api_key: ApiKey = "") -> None:
    """Follow a job to its end; the stream is resumed when a connection breaks."""

    async def use(client: "NearloopClient") -> None:
        await client.get_job(job_id)  # a watch waits for a gateway as long as it takes; that one is there is asked before
        async with aclosing(client.watch(job_id)) as items:
            async for item in items:
                cli_output.show_item(item, as_json)

    with_client(address, api_key, use)


def cancel(job_id: JobId, as_json: AsJson = False, address: Address = DEFAULT_ADDRESS, api_key: ApiKey = "") -> None:
    """Cancel a job that has not ended."""

    async def use(client: "NearloopClient") -> None:
        cli_output.show_job(await client.cancel(job_id), as_json)

    with_client(address, api_key, use)


def targets(
    kind: Annotated[Kind | None, typer.Option("--kind", help="Only this kind.")] = None,
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = "",
) -> None:
    """List what steps can be for, and where workers for it live."""

    async def use(client: "NearloopClient") -> None:
        cli_output.show_targets(await client.targets(kind), as_json)

    with_client(address, api_key, use)

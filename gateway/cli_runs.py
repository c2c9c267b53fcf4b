"""nearloop run, place, runs ...: programs that the gateway executes.

The output goes to stdout and what happens to stderr, so that `nearloop run ... | jq` works.
"""

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gateway.cli_client import ApiKey, AsJson, LaneOption, read_input, with_client
from gateway.cli_common import DEFAULT_ADDRESS, Address, Group
from gateway.types import Lane

if TYPE_CHECKING:
    from gateway.client import NearloopClient

File = Annotated[Path, typer.Argument(help="A program in YAML or JSON.", exists=True, dir_okay=False)]
Input = Annotated[str, typer.Option("--input", metavar="JSON|@FILE|-", help="The program's input; `-` reads it from stdin.")]
Regions = Annotated[list[str] | None, typer.Option("--region", help="The run must not leave it; may be repeated.")]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="KIND.TARGET", help="The run may call it, and only what is named; may be repeated."),
]
Speculate = Annotated[int, typer.Option("--speculate", min=0, max=16, help="So many steps at a time before they are known to be needed.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the output, and the summary.")]
RunId = Annotated[str, typer.Argument(help="Id of the run, as `nearloop run` printed it.")]

runs_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode="markdown", help="Runs of programs: get, watch, cancel.")


def register(app: typer.Typer) -> None:
    app.command(epilog="""Example: `nearloop run answer.yaml --input '{"question": "What is a lease?"}'`""")(run)
    app.command(epilog="Example: `nearloop place answer.yaml --region home --region iad`")(place)
    app.add_typer(runs_app, name="runs")


def run(
    file: File,
    text: Input = "{}",
    key: Annotated[str, typer.Option("--key", help="Idempotency key: the same key again is the same run.")] = "",
    lane: LaneOption = Lane.INTERACTIVE,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.001, metavar="SECONDS", help="For the whole run.")] = 600.0,
    regions: Regions = None,
    allow: Allow = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show what models say as it comes.")] = False,
    speculate: Speculate = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Print the run's id once it is accepted, and do not wait for it.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = "",
) -> None:
    """Run a program, show what happens in it, and print its output. The run goes on when this command is stopped."""
    program, body = _program(file), _json(text)
    options: dict[str, Any] = {
        "lane": lane,
        "timeout_s": timeout_s,
        "idempotency_key": key,
        "regions": regions or (),
        "allow": allow or (),
        "tokens": tokens,
        "speculate": speculate,
    }

    async def use(client: "NearloopClient") -> None:
        from gateway import cli_run_output

        if detach:
            cli_run_output.show_submitted(await client.submit_run(program, body, **options), as_json)
        else:
            await _follow(client.run(program, body, **options), as_json, quiet)

    with_client(address, api_key, use)


def place(
    file: File,
    text: Input = "{}",
    regions: Regions = None,
    as_json: AsJson = False,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = "",
) -> None:
    """Say where a program would run now, how long it would wait for the network in each region, and why. Nothing is run."""
    program, body = _program(file), _json(text)

    async def use(client: "NearloopClient") -> None:
        from gateway import cli_run_output

        cli_run_output.show_placement(await client.place_run(program, body, regions=regions or ()), as_json)

    with_client(address, api_key, use)


@runs_app.callback()
def _group() -> None: ...


@runs_app.command("get", epilog="Example: `nearloop runs get home-0123456789abcdef0123456789abcdef`")
def get_run(run_id: RunId, as_json: AsJson = False, address: Address = DEFAULT_ADDRESS, api_key: ApiKey = "") -> None:
    """Print where a run stands, its completed steps, and its output when it has ended."""

    async def use(client: "NearloopClient") -> None:
        from gateway import cli_run_output

        cli_run_output.show_run(await client.get_run(run_id), as_json)

    with_client(address, api_key, use)


@runs_app.command("watch", epilog="Example: `nearloop runs watch home-0123456789abcdef0123456789abcdef`")
def watch_run(
    run_id: RunId, quiet: Quiet = False, as_json: AsJson = False, address: Address = DEFAULT_ADDRESS, api_key: ApiKey = ""
) -> None:
    """Follow a run to its end; the stream is resumed when a connection breaks."""

    async def use(client: "NearloopClient") -> None:
        await client.get_run(run_id)  # a watch waits for a gateway as long as it takes; that one is there is asked before
        await _follow(client.watch_run(run_id), as_json, quiet)

    with_client(address, api_key, use)


@runs_app.command("cancel", epilog="Example: `nearloop runs cancel home-0123456789abcdef0123456789abcdef`")
def cancel_run(run_id: RunId, as_json: AsJson = False, address: Address = DEFAULT_ADDRESS, api_key: ApiKey = "") -> None:
    """Cancel a run that has not ended."""

    async def use(client: "NearloopClient") -> None:
        from gateway import cli_run_output

        cli_run_output.show_run(await client.cancel_run(run_id), as_json)

    with_client(address, api_key, use)


async def _follow(items: Any, as_json: bool, quiet: bool) -> None:
    from gateway import cli_run_output

    shown = cli_run_output.Live(as_json, quiet)
    try:
        async with aclosing(items) as following:
            async for item in following:
                shown.show(item)
    except asyncio.CancelledError:
        shown.left()
        raise
    finally:
        shown.end_line()


def _program(file: Path) -> str:
    """Raises BadParameter. The gateway reads a text that begins with a brace as JSON."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{file} is not UTF-8 text") from None
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from None


def _json(text: str) -> Any:
    """Raises BadParameter."""
    try:
        return json.loads(read_input(text).data, parse_constant=_no_constant)
    except ValueError as error:
        raise typer.BadParameter(f"--input is not JSON: {error}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")

"""nearloop doctor: the table."""

import asyncio
import json
from typing import Annotated

import typer

from gateway.cli_common import DEFAULT_ADDRESS, Address, ConfigFile, terminal_width
from gateway.config import load


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: `nearloop doctor --address 127.0.0.1:50051`")(doctor)


def doctor(
    config_file: ConfigFile = None,
    address: Address = DEFAULT_ADDRESS,
    nats: Annotated[str, typer.Option(metavar="URL", envvar="NATS_URL", show_envvar=True, help="The NATS server to look at.")] = "",
    triton: Annotated[str, typer.Option(metavar="HOST:PORT", help="The Triton to look at, by its gRPC address.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """Say what is reachable, which versions, what is wrong and what to do. Exit code 1 when something needed is wrong."""
    from rich.console import Console
    from rich.table import Table

    from gateway.doctor import State, examine_all, find

    config = load(config_file)
    checks = asyncio.run(examine_all(config, find(config, address, nats, triton)))
    if as_json:
        rows = [{"name": check.name, "state": check.state.value, "found": check.found, "todo": check.todo} for check in checks]
        typer.echo(json.dumps(rows, indent=2))
    else:
        table = Table("", "part", "what was found", box=None, pad_edge=False)
        colours = {State.OK: "green", State.NOTE: "yellow", State.WRONG: "red"}
        for check in checks:
            todo = f"\n-> {check.todo}" if check.todo else ""
            table.add_row(f"[{colours[check.state]}]{check.state.value}[/]", check.name, (check.found + todo).replace("[", "\\["))
        Console(width=terminal_width()).print(table, highlight=False)
    wrong = [check.name for check in checks if check.state is State.WRONG]
    if wrong:
        typer.echo(f"nearloop: wrong: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)

"""nearloop program ...: is a program right, before anything runs it?"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli_client import ApiKey, with_client
from gateway.cli_common import DEFAULT_ADDRESS, Address, Group
from gateway.types import Target

program_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode="markdown", help="Programs of many steps: check one.")


def register(app: typer.Typer) -> None:
    app.add_typer(program_app, name="program")


@program_app.callback()
def _group() -> None: ...


@program_app.command("check", epilog="Example: `nearloop program check answer.yaml --live`")
def check_program(
    file: Annotated[Path, typer.Argument(help="A program in YAML or JSON.", exists=True, dir_okay=False)],
    live: Annotated[bool, typer.Option("--live", help="Ask the gateway for its targets, and check against them too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = "",
) -> None:
    """Say what is wrong with a program, everything at once: names, references, expressions, loops, and the most it can cost.

    Nothing is run. Exit code 1 when there are errors.
    """
    targets: dict[str, Target] = {}
    if live:
        from gateway.client import NearloopClient

        async def ask(client: NearloopClient) -> None:
            targets.update({status.target.scope: status.target for status in await client.targets()})

        with_client(address, api_key, ask)
    if not _told(file, targets if live else None, as_json):
        raise typer.Exit(1)


def _told(file: Path, targets: Mapping[str, Target] | None, as_json: bool) -> bool:
    """Prints what was found; true when the program can be used."""
    from gateway.program.bounds import bound
    from gateway.program.check import Finding, check
    from gateway.program.parse import load_text
    from gateway.program.problems import ProgramInvalid

    limits = None
    try:
        program = load_text(file.read_text(), file.name)
    except UnicodeDecodeError:
        findings = [Finding("error", "", "is not UTF-8 text")]
    except ProgramInvalid as invalid:
        findings = [Finding("error", path, text) for path, text in invalid.problems]
    else:
        findings = check(program, targets)
        limits = bound(program, targets)
    wrong = any(finding.severity == "error" for finding in findings)
    if as_json:
        document = {"valid": not wrong, "findings": [asdict(one) for one in findings], "bound": asdict(limits) if limits else None}
        typer.echo(json.dumps(document, indent=2))
        return not wrong
    for finding in findings:
        typer.echo(f"{finding.severity}: {finding.path + ': ' if finding.path else ''}{finding.text}", err=finding.severity == "error")
    if limits is not None and not wrong:
        typer.echo(f"{file} is valid: at most {limits.steps} steps and {limits.cost:g} cost units")
        if targets is None:
            typer.echo("note: its targets were not looked up: --live asks a gateway", err=True)
    return not wrong

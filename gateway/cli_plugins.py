"""nearloop plugins ...: which policies there are, what one takes, whether it keeps the contract, and a new one to start from."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli_common import ConfigFile, Group, terminal_width
from gateway.config import Config, load
from gateway.policy import PolicyType, Slot

plugins_app = typer.Typer(
    cls=Group, no_args_is_help=True, rich_markup_mode="markdown", help="Policies: list, describe, check, and start a new one."
)
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]


def register(app: typer.Typer) -> None:
    app.add_typer(plugins_app, name="plugins")


@plugins_app.command("list", epilog="Example: `nearloop plugins list --config config/nearloop.toml`")
def list_policies(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every policy type: its slot, where it comes from, and under which names the configuration uses it."""
    from gateway import loader
    from gateway.plugin_facts import origin

    config = load(config_file)
    manager = loader.find_plugins(config)
    loader.policy_types(manager)  # refuses names that are taken twice
    used = _used(config)
    types = sorted(loader.brought(manager), key=lambda one: (list(Slot).index(one[1].slot), one[1].name))
    rows = [
        {
            "name": policy_type.name,
            "slot": policy_type.slot.value,
            "from": origin(plugin),
            "used_as": used.get(policy_type.name, []),
            "summary": policy_type.summary,
        }
        for plugin, policy_type in types
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("slot", "policy", "from", "used as", "what it does", box=None, pad_edge=False)
    for row in rows:
        names = ", ".join(row["used_as"])
        table.add_row(*(str(cell).replace("[", "\\[") for cell in (row["slot"], row["name"], row["from"], names, row["summary"])))
    Console(width=terminal_width()).print(table, highlight=False)


@plugins_app.command("describe", epilog="Example: `nearloop plugins describe token_bucket`")
def describe(name: Annotated[str, typer.Argument(help="A policy, module or module:Name.")], config_file: ConfigFile = None) -> None:
    """What a policy does, its parameters with types and defaults, and the methods of its slot."""
    from gateway import loader
    from gateway.plugin_facts import find_types

    for policy_type in find_types(name, loader.find_plugins(load(config_file))):
        typer.echo("\n".join(_description(policy_type)))


@plugins_app.command("check", epilog="Example: `nearloop plugins check my_policies.lane_guard`")
def check(
    name: Annotated[str, typer.Argument(help="A policy, module or module:Name.")],
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Does a policy keep the contract, and what does it cost for each step? Exit code 1 when something was found."""
    from gateway import loader
    from gateway.conformance import Finding, check_policy, measure
    from gateway.plugin_facts import find_types

    rows, found = [], []
    for policy_type in find_types(name, loader.find_plugins(load(config_file))):
        findings = check_policy(policy_type)
        cost = None if findings else measure(policy_type)
        if cost is not None:
            findings += [Finding("cost", f"policy {policy_type.name}: {one}") for one in cost.findings]
        found += findings
        rows.append(
            {
                "policy": policy_type.name,
                "slot": policy_type.slot.value,
                "findings": [dataclasses.asdict(finding) for finding in findings],
                "cost_us": dataclasses.asdict(cost) if cost else None,
            }
        )
        if not as_json:
            for finding in findings:
                typer.echo(str(finding))
            if cost is not None:
                typer.echo(f"{policy_type.name} costs {cost.few_us:.1f} us for a step with 10 flows and {cost.many_us:.1f} us with 5000")
            if not findings:
                typer.echo(f"{policy_type.name} keeps the contract of the slot {policy_type.slot}")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    if found:
        typer.echo(f"nearloop: {len(found)} finding{'' if len(found) == 1 else 's'} in {name}", err=True)
        raise typer.Exit(1)


@plugins_app.command("new", epilog="Example: `nearloop plugins new night_shift --slot admission`")
def new(
    name: Annotated[str, typer.Argument(help="Of the policy: lower-case letters, digits and '_'.")],
    slot: Annotated[Slot, typer.Option(help="What it decides about.")],
    directory: Annotated[Path, typer.Option(help="Where its folder goes.")] = Path(),
) -> None:
    """Write a package with a policy that works, its README and its test. Nothing that exists is changed."""
    from gateway import loader
    from gateway.scaffolding import CannotWrite, write_package

    if name in loader.policy_types(loader.find_plugins(load(None))):
        raise typer.BadParameter(f"there is a policy {name!r} already: names are unique over all plugins")
    try:
        written = write_package(name, slot, directory)
    except CannotWrite as error:
        raise typer.BadParameter(str(error)) from None
    for path in written:
        typer.echo(str(path))
    typer.echo(f"next: pip install --no-build-isolation -e {written[0].parent} && nearloop plugins check {name}", err=True)


def _used(config: Config) -> dict[str, list[str]]:
    used: dict[str, list[str]] = {}
    for section in config.policies:
        name = section.name or section.use
        used.setdefault(section.use, []).append(f"{name} (shadow)" if section.shadow else name)
    return used


def _description(policy_type: PolicyType) -> list[str]:
    from gateway import plugin_facts

    lines = [f"{policy_type.name}, a policy of the slot {policy_type.slot}: {policy_type.summary}", ""]
    lines += [*plugin_facts.documentation(policy_type).splitlines(), "", "Parameters:"]
    for parameter in plugin_facts.parameters(policy_type):
        default = "needed" if parameter.default is dataclasses.MISSING else f"= {parameter.default!r}"
        lines.append(f"  {parameter.name}: {parameter.type} {default}")
    lines += ["  none"] if not plugin_facts.parameters(policy_type) else []
    lines += [f"  {line}".rstrip() for line in ("", *inspect.cleandoc(policy_type.config.__doc__ or "").splitlines())]
    live = hasattr(policy_type.build, "reconfigure")
    lines += ["", f"Objects: {plugin_facts.objects(policy_type)}."]
    lines += [f"When it fails, unless the configuration says otherwise: {plugin_facts.on_error(policy_type)}."]
    lines += [f"Parameters can be changed while it runs: {'yes' if live else 'no, it has no reconfigure()'}."]
    return [*lines, "", "Methods of the slot:", *(f"  {method}" for method in plugin_facts.methods(policy_type.slot))]

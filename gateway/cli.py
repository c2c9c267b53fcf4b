"""nearloop ...: starts a stack, runs one part, asks a gateway. Each command imports what it needs when it runs."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gateway import __version__, cli_client, cli_doctor, cli_plugins, cli_program, cli_runs
from gateway.cli_common import ConfigFile, Group, run_async
from gateway.config import Config, load
from gateway.supervised import PartFailed

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Runs the agentic execution loop on the server side, next to the APIs it calls. Start with `nearloop demo`.",
)
config_app = typer.Typer(no_args_is_help=True, help="Configuration files.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nearloop {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")] = False,
) -> None: ...


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)


@app.command(epilog="Example: `nearloop up --config config/nearloop.toml --state-dir ~/nearloop`")
def up(
    config_file: ConfigFile = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT of the gateway; port 0 takes a free one.")] = "",
    state_dir: Annotated[Path | None, typer.Option(help="Keeps queues and logs here; without it nothing is left behind.")] = None,
    nats: Annotated[str, typer.Option(metavar="URL", help="Use this NATS server instead of starting one.")] = "",
    triton: Annotated[str, typer.Option(metavar="HOST:PORT", help="Use the Triton with this gRPC address instead of starting one.")] = "",
    no_triton: Annotated[bool, typer.Option("--no-triton", help="No models.")] = False,
    regions: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="Give each of these regions a nats-server of its own; the first is the gateway's.")
    ] = "",
    wan_ms: Annotated[
        float, typer.Option(min=0, max=2000, help="With --regions: simulate this round trip between the first region and each other one.")
    ] = 0.0,
    gateways: Annotated[int, typer.Option(min=1, help="How many gateways; the second and further ones take free ports.")] = 1,
    nats_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    nats_http_port: Annotated[int, typer.Option(min=0, max=65535, help="nats-server's monitoring. 0: any free one.")] = 0,
    triton_port: Annotated[int, typer.Option(min=0, max=65535, help="Triton's gRPC. 0: any free one.")] = 0,
    triton_http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    triton_metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
) -> None:
    """Start nats-server, Triton, workers and a gateway; restart what dies; stop all on Ctrl-C."""
    from gateway.cli_up import settle, split_regions, stay_up
    from gateway.up import Ports, Stack

    names = split_regions(regions, wan_ms)
    config = settle(load(config_file), config_file is None, listen, nats, triton, typer.echo, names)
    stack = Stack(
        config,
        state_dir=state_dir,
        on_line=typer.echo,
        gateways=gateways,
        triton=not no_triton,
        ports=Ports(nats_port, nats_http_port, triton_port, triton_http_port, triton_metrics_port),
        regions=names,
        wan=dict.fromkeys(names[1:], wan_ms / 1000) if wan_ms else {},
    )
    if wan_ms:
        typer.echo(f"simulated: {wan_ms:g} ms to and fro between {names[0]} and {', '.join(names[1:])}")
    run_async(lambda: stay_up(stack, typer.echo))


@app.command(epilog="Example: `nearloop gateway --config config/nearloop.toml --listen 127.0.0.1:50051`")
def gateway(
    config_file: ConfigFile = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT instead of the configuration's.")] = "",
    port_file: Annotated[Path | None, typer.Option(help="Gets the bound address once the gateway serves.")] = None,
) -> None:
    """Run one gateway until SIGTERM. It needs a NATS server: `nats.urls` in the configuration."""
    from gateway.cli_up import with_listen
    from gateway.serve import run_gateway

    config = with_listen(load(config_file), listen)
    _need_nats(config, config.gateway.region)
    _log_to_stderr()

    async def main() -> int:
        await run_gateway(config, port_file=str(port_file) if port_file else None)
        return 0

    run_async(main)


@app.command(epilog="Example: `nearloop worker tools --region home --config config/nearloop.toml`")
def worker(
    what: Annotated[str, typer.Argument(metavar="{triton|tools|retrieve|runs}", help="What it executes.")],
    region: Annotated[str, typer.Option(help="The region that it belongs to.")],
    config_file: ConfigFile = None,
) -> None:
    """Run one worker until SIGTERM. It needs a NATS server: `nats.urls` in the configuration."""
    from gateway.parts import WORKER_WORDS

    kinds = {word: kind for kind, word in WORKER_WORDS.items()}
    if what not in kinds:
        raise typer.BadParameter(f"{what!r} is no worker: say triton, tools, retrieve or runs")
    config = load(config_file)
    if region not in config.region_names:
        raise typer.BadParameter(f"there is no region {region!r} in the configuration: it has {', '.join(config.region_names)}")
    _need_nats(config, region)
    _log_to_stderr()
    from gateway.types import Kind
    from workers.serve import run_worker

    async def main() -> int:
        await run_worker(config, Kind(kinds[what]), region)
        return 0

    run_async(main)


def _need_nats(config: Config, region: str) -> None:
    if not config.nats_urls(region):
        raise PartFailed(f"no NATS server is configured for region {region!r}: set nats.urls, or let `nearloop up` start one")


@app.command(epilog='Example: `nearloop demo --ask "how do I read a file line by line"`')
def demo(
    ask: Annotated[list[str] | None, typer.Option("--ask", help="A question about Python's standard library; may be repeated.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running until Ctrl-C.")] = False,
) -> None:
    """Start everything, let agents answer questions over two regions, show where the time went, stop everything."""
    from gateway.demo.run import DemoOptions, run_demo

    run_async(lambda: run_demo(DemoOptions(ask=tuple(ask or ()), keep=keep)))


@app.command(epilog="Example: `nearloop key --tenant acme`, then put the printed lines under `[[auth.keys]]`.")
def key(tenant: Annotated[str, typer.Option(help="Whose key it is.")] = "acme") -> None:
    """Make an API key. It is shown once; the configuration holds its hash only."""
    import hashlib
    import secrets

    from gateway.subjects import ID_RULE, is_id

    if not is_id(tenant):
        raise typer.BadParameter(f"{tenant!r} is no tenant: {ID_RULE}")
    text = f"nl_{secrets.token_urlsafe(32)}"
    typer.echo(f"API key, shown once: {text}\n\nFor the configuration:\n")
    typer.echo(f'[[auth.keys]]\ntenant = "{tenant}"\nsha256 = "{hashlib.sha256(text.encode()).hexdigest()}"')


@config_app.command("check", epilog="Example: `nearloop config check config/nearloop.toml`")
def config_check(file: Annotated[Path, typer.Argument(help="A TOML file.")]) -> None:
    """Say what is wrong with a configuration, everything at once."""
    from gateway import loader

    config = load(file)
    loader.build_policies(config, loader.find_plugins(config))
    keys = len(config.auth.keys)
    who = f"{keys} API key{'' if keys == 1 else 's'}" + (
        f", tenant {config.auth.anonymous_tenant!r} without a key" * bool(config.auth.anonymous_tenant)
    )
    typer.echo(f"{file} is valid: regions {', '.join(config.region_names)}; {who}; policies {', '.join(p.use for p in config.policies)}")
    if not keys and not config.auth.anonymous_tenant:
        typer.echo("note: nobody can call: add [[auth.keys]] (see `nearloop key`) or auth.anonymous_tenant", err=True)


def main() -> None:
    """The console script."""
    # Before gRPC is imported: uvloop forks, and gRPC's handlers of forks now and then crash a child that never uses gRPC before its exec.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        app(prog_name="nearloop")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("NEARLOOP_DEBUG"):
            raise
        typer.echo(f"nearloop: unexpected {type(error).__name__}: {error} (NEARLOOP_DEBUG=1 shows where)", err=True)
        raise SystemExit(1) from None


cli_client.register(app)
cli_doctor.register(app)
cli_plugins.register(app)
cli_program.register(app)
cli_runs.register(app)
app.add_typer(config_app, name="config")

if __name__ == "__main__":
    main()

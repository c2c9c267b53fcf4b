"""What all commands share: options, exit codes, the event loop."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gateway.addresses import PortInUse
from gateway.errors import ConfigError, NearloopError
from gateway.supervised import PartFailed

_EXPECTED = (ConfigError, NearloopError, PartFailed, PortInUse, OSError, TimeoutError)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", envvar="NEARLOOP_CONFIG", help="TOML file; without one the defaults: one region, `home`.")
]
Address = Annotated[str, typer.Option("--address", envvar="NEARLOOP_ADDRESS", metavar="HOST:PORT", help="The gateway.")]
DEFAULT_ADDRESS = "127.0.0.1:50051"


class Group(TyperGroup):
    """Exit codes: 0, 1 for what went wrong (one sentence on stderr), 2 for a wrong command line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            foreign = type(error).__module__.startswith("grpc")
            if os.environ.get("NEARLOOP_DEBUG") or not (foreign or isinstance(error, _EXPECTED)):
                raise
            typer.echo(f"nearloop: {sentence(error)}", err=True)
            raise typer.Exit(1) from error


def sentence(error: Exception) -> str:
    """What a person should read of an error."""
    if isinstance(error, NearloopError):
        again = f" (try again in {error.retry_after_s:.1f} s)" if error.retry_after_s else ""
        return f"{error.code} {error.reason}: {error.message}{again}"
    if type(error).__module__.startswith("grpc") and hasattr(error, "details") and hasattr(error, "code"):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


def run_async(main: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Runs main on uvloop and exits with what it returns."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(main())
    if code:
        raise typer.Exit(code)


def terminal_width() -> int | None:
    """Of a table: what the terminal has; 160 columns in a pipe, where nobody can make it wider."""
    return None if sys.stdout.isatty() else 160

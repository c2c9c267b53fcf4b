"""What `nearloop up` does between its command line and the stack."""

import asyncio
from collections.abc import Callable, Sequence

from gateway import addresses
from gateway.config import Config
from gateway.supervisor import PartFailed, interrupts
from gateway.up import Stack


def with_listen(config: Config, listen: str) -> Config:
    """Raises PartFailed for what is no address."""
    try:
        addresses.split(listen or config.gateway.listen)
    except ValueError as error:
        raise PartFailed(f"--listen: {error}") from None
    return config.model_copy(update={"gateway": config.gateway.model_copy(update={"listen": listen})}) if listen else config


def settle(
    config: Config, is_default: bool, listen: str, nats: str, triton: str, on_line: Callable[[str], None], regions: Sequence[str] = ()
) -> Config:
    """The configuration with the options of the command line. Raises PartFailed."""
    config = with_listen(config, listen)
    if nats:
        config = config.model_copy(update={"nats": config.nats.model_copy(update={"urls": tuple(nats.split(","))})})
    if triton:
        config = config.model_copy(update={"triton": config.triton.model_copy(update={"url": triton, "urls": ()})})
    if is_default:
        # Without a file there are no keys either: a newcomer can call, from this machine only, and has something to call.
        host, _ = addresses.split(config.gateway.listen)
        if host in ("127.0.0.1", "localhost", "::1"):
            config = config.model_copy(update={"auth": config.auth.model_copy(update={"anonymous_tenant": "local"})})
            on_line("no --config: calls need no API key and are those of tenant 'local'")
        if regions:  # nothing says where the gateway stands, and Triton
            config = config.model_copy(
                update={
                    "gateway": config.gateway.model_copy(update={"region": regions[0]}),
                    "triton": config.triton.model_copy(update={"region": regions[0]}),
                }
            )
        config = config.model_copy(update={"tools": config.tools.model_copy(update={"modules": ("workers.builtin_tools",)})})
    if not config.auth.keys and not config.auth.anonymous_tenant:
        on_line("note: nobody can call this gateway: add [[auth.keys]] (see `nearloop key`) or auth.anonymous_tenant")
    return config


def split_regions(text: str, wan_ms: float) -> tuple[str, ...]:
    """`home,iad,sjc` -> the names, which Stack checks. Raises PartFailed."""
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if wan_ms and len(names) < 2:
        raise PartFailed("--wan-ms is the distance between regions: name two or more with --regions")
    return names


async def stay_up(stack: Stack, on_line: Callable[[str], None]) -> int:
    """Runs the stack until Ctrl-C or SIGTERM; returns the exit code. Raises PartFailed, PortInUse."""
    with interrupts(stack.kill_now) as stop:
        asked = asyncio.create_task(stop.wait())
        entering = asyncio.create_task(stack.__aenter__())
        await asyncio.wait({entering, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not entering.done():
            on_line("stopping ...")
            entering.cancel()  # it stops what it has started
            await asyncio.wait({entering})
            return 0
        entering.result()
        try:
            on_line(
                f"ready: gateway {', '.join(stack.gateway_addresses)}, {_shown_nats(stack)}, "
                f"triton {stack.triton_url or 'none'}, state in {stack.state_dir}; Ctrl-C stops"
            )
            await asked
            on_line("stopping ...")
        finally:
            await stack.__aexit__(None, None, None)
        on_line("stopped")
    return 0


def _shown_nats(stack: Stack) -> str:
    if not stack.nats_urls:
        return f"nats {addresses.shown_url(stack.nats_url)} (its url with the token is in {stack.nats_url_file})"
    servers = ", ".join(f"nats {region} {addresses.shown_url(url)}" for region, url in stack.nats_urls.items())
    return f"{servers} (their urls with the tokens are in {stack.state_dir}/nats-REGION.url)"

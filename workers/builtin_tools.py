"""Tools that come with Nearloop; list `workers.builtin_tools` in tools.modules to serve them."""

from gateway.types import Payload
from workers.tool_functions import tool


@tool(read_only=True, idempotent=True)
async def echo(input: Payload) -> Payload:
    """Returns its input unchanged, whatever it is: for first steps and for benchmarks."""
    return input

"""The tool of the soak: takes a while, computes nothing."""

import asyncio

from workers.tool_functions import tool


@tool(read_only=True, idempotent=True)
async def linger(number: int, seconds: float, size: int = 0) -> dict[str, object]:
    """Sleeps, then returns its number and `size` characters."""
    await asyncio.sleep(seconds)
    return {"number": number, "pad": "x" * size}

"""Function tools at the ledger of a test, whose address is in LEDGER_URL. Nobody can measure how far away a function's API is, so each is
taken to be at its home."""

import os

import aiohttp

from workers.tool_functions import ToolContext, tool


async def _noted(run: str, step: str, n: int, key: str) -> dict[str, object]:
    async with (
        aiohttp.ClientSession(raise_for_status=True) as session,
        session.post(os.environ["LEDGER_URL"], json={"run": run, "step": step, "n": n}, headers={"Idempotency-Key": key}) as answer,
    ):
        found: dict[str, object] = await answer.json()
        return found


@tool(idempotent=True, home_region="iad")
async def fetch(run: str, step: str, n: int, context: ToolContext) -> dict[str, object]:
    """May be called twice."""
    return await _noted(run, step, n, context.idempotency_key)


@tool(home_region="iad")
async def charge(run: str, step: str, n: int, context: ToolContext) -> dict[str, object]:
    """Must not be called twice, as far as anybody says."""
    return await _noted(run, step, n, context.idempotency_key)


@tool(idempotent=True, home_region="home")
async def local(run: str, step: str, n: int, context: ToolContext) -> dict[str, object]:
    """May be called twice."""
    return await _noted(run, step, n, context.idempotency_key)

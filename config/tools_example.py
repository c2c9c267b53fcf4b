"""Sample tools. Put the file where Python finds it and list it: tools.modules = ["tools_example"]."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Annotated

from pydantic import Field

from workers.tool_functions import ToolContext, ToolError, tool


@tool(read_only=True, idempotent=True)
def frequent_words(text: str, top: Annotated[int, Field(ge=1, le=100)] = 5) -> dict[str, int]:
    """The most frequent words of a text, with how often they occur.

    A plain function: it runs in a thread.
    """
    return dict(Counter(text.lower().split()).most_common(top))


@tool(read_only=True, idempotent=True)
async def divide(dividend: float, divisor: float) -> float:
    """Divides two numbers."""
    if divisor == 0:
        raise ToolError("the divisor is 0", code="INVALID_ARGUMENT", reason="DIVISION_BY_ZERO")
    return dividend / divisor


@tool(read_only=True, idempotent=True)
async def spell(text: str) -> AsyncGenerator[str, None]:
    """Streams the characters of a text, one token each."""
    for character in text:
        yield character
        await asyncio.sleep(0)


@tool(name="order", timeout_s=10, cost=5)
async def place_order(article: str, context: ToolContext) -> dict[str, str | int]:
    """Pretends to order an article, under the step's idempotency key."""
    if not context.idempotency_key:
        raise ToolError("an order needs an idempotency key", code="INVALID_ARGUMENT", reason="KEY_NEEDED")
    context.progress(0.5, "sent")
    return {"article": article, "order": context.idempotency_key, "attempt": context.attempt}

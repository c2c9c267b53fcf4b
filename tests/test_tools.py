"""Function tools: schemas, calls, how they end."""

import asyncio
import json
import runpy
import sys
import threading
import types
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs
import pytest

from gateway.config import parse
from gateway.errors import ConfigError, InvalidStep, StepFailed, Unavailable
from gateway.types import Kind, Payload, Step
from workers.tool_functions import ToolContext, ToolError, tool
from workers.tools import ToolsExecutor

SAMPLE = Path(__file__).parents[1] / "config" / "tools_example.py"


class FakeWork:
    """A step that is executed, and what its tool said meanwhile."""

    def __init__(self, target: str, data: object = None, *, key: str = "", remaining_s: float = 30.0, raw: Payload | None = None) -> None:
        self.step = Step(
            "step-1", "acme", Kind.TOOL, target, raw or Payload(json.dumps(data or {}).encode()), 0.0, run="run-1", idempotency_key=key
        )
        self.attempt = 2
        self.tokens: list[Payload] = []
        self.said: list[tuple[float, str]] = []
        self._remaining_s = remaining_s

    def remaining_s(self) -> float:
        return self._remaining_s

    def emit(self, token: Payload) -> None:
        self.tokens.append(token)

    def progress(self, fraction: float, message: str) -> None:
        self.said.append((fraction, message))


Serve = Callable[..., Any]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serves functions as the tools of a module, in a started executor."""

    @asynccontextmanager
    async def run(*functions: object, **section: object) -> AsyncIterator[ToolsExecutor]:
        module = types.ModuleType("tools_under_test")
        vars(module).update({f"f{index}": function for index, function in enumerate(functions)})
        monkeypatch.setitem(sys.modules, "tools_under_test", module)
        executor = ToolsExecutor(parse({"tools": {"modules": ["tools_under_test"], **section}}))
        await executor.start()
        try:
            yield executor
        finally:
            await executor.close()

    return run


def out(payload: Payload) -> Any:
    assert payload.content_type == "application/json"
    return json.loads(payload.data)


async def test_typed_function_gives_schema_and_json(serve: Serve) -> None:
    @tool(read_only=True, idempotent=True, timeout_s=7, cost=2, slots=3)
    async def area(width: float, height: float = 2.0, unit: Literal["m", "ft"] = "m") -> dict[str, object]:
        """The area
        of a rectangle.

        More.
        """
        return {"area": width * height, "unit": unit}

    async with serve(area) as executor:
        (target,) = executor.targets()
        assert (target.name, target.description, target.read_only, target.idempotent) == ("area", "The area of a rectangle.", True, True)
        assert (target.timeout_s, target.cost, target.slots, target.home_region) == (7, 2, 3, "home")
        schema = jsonschema_rs.validator_for(target.input_schema)
        assert schema.is_valid({"width": 3})
        assert not schema.is_valid({"width": 3, "depth": 1})
        assert not schema.is_valid({"height": 3})
        assert target.input_schema["properties"]["height"]["default"] == 2.0
        assert out(await executor.execute(FakeWork("area", {"width": 3}))) == {"area": 6.0, "unit": "m"}
    assert await area(1) == {"area": 2.0, "unit": "m"}


@pytest.mark.parametrize("data", [{}, {"width": "wide"}, {"width": 1, "depth": 2}, [1], "x"])
async def test_input_is_validated_again(serve: Serve, data: object) -> None:
    @tool
    async def area(width: float) -> float:
        raise AssertionError("must not be called")

    async with serve(area) as executor:
        with pytest.raises(InvalidStep) as caught:
            await executor.execute(FakeWork("area", raw=Payload(json.dumps(data).encode())))
        assert caught.value.fields[0][0].startswith("input")
        assert "wide" not in caught.value.message
        with pytest.raises(InvalidStep):
            await executor.execute(FakeWork("area", raw=Payload(b'{"width":1}', "text/plain")))
        with pytest.raises(InvalidStep):
            await executor.execute(FakeWork("area", raw=Payload(b'{"width":')))


async def test_echo_passes_bytes_through() -> None:
    executor = ToolsExecutor(parse({"tools": {"modules": ["workers.builtin_tools"]}}))
    await executor.start()
    sent = Payload(b'{ "not":  reserialised }', "text/x-anything")
    assert await executor.execute(FakeWork("echo", raw=sent)) is sent
    await executor.close()


async def test_context_is_injected_and_not_in_the_schema(serve: Serve) -> None:
    @tool
    def plain(name: str, context: ToolContext) -> list[object]:
        assert threading.current_thread() is not threading.main_thread()
        context.progress(0.5, "half")
        context.emit({"token": 1})
        return [name, context.idempotency_key, context.step_id, context.tenant, context.attempt, context.run, context.remaining_s()]

    async with serve(plain) as executor:
        work = FakeWork("plain", {"name": "n"}, key="k-1")
        assert list(executor.targets()[0].input_schema["properties"]) == ["name"]
        assert out(await executor.execute(work)) == ["n", "k-1", "step-1", "acme", 2, "run-1", 30.0]
        assert work.said == [(0.5, "half")]
        assert work.tokens == [Payload(b'{"token":1}')]
        with pytest.raises(InvalidStep):
            await executor.execute(FakeWork("plain", {"name": "n", "context": {}}))


async def test_generator_streams_tokens(serve: Serve) -> None:
    @tool
    async def count(to: int) -> AsyncGenerator[dict[str, int], None]:
        for number in range(to):
            yield {"n": number}

    async with serve(count) as executor:
        work = FakeWork("count", {"to": 2})
        assert out(await executor.execute(work)) == {"tokens": [{"n": 0}, {"n": 1}]}
        assert [json.loads(token.data) for token in work.tokens] == [{"n": 0}, {"n": 1}]


async def test_errors_of_a_tool(serve: Serve) -> None:
    @tool
    async def refuses() -> None:
        raise ToolError("not today", code="NOT_FOUND", reason="CLOSED")

    @tool
    async def breaks(secret: str) -> int:
        return int(secret)

    @tool
    def breaks_in_a_thread(secret: str) -> int:
        return int(secret)

    @tool
    async def down() -> None:
        raise Unavailable("later")

    @tool
    async def odd() -> object:
        return object()

    @tool
    async def infinite() -> float:
        return float("nan")

    async with serve(refuses, breaks, breaks_in_a_thread, down, odd, infinite) as executor:
        with pytest.raises(StepFailed) as caught:
            await executor.execute(FakeWork("refuses"))
        assert (caught.value.code, caught.value.reason, caught.value.message) == ("NOT_FOUND", "CLOSED", "not today")
        for name in ("breaks", "breaks_in_a_thread"):
            with pytest.raises(StepFailed) as caught:
                await executor.execute(FakeWork(name, {"secret": "hunter2"}))
            assert (caught.value.code, caught.value.reason) == ("INTERNAL", "TOOL_ERROR")
            assert "ValueError in tests.test_tools" in caught.value.message or "ValueError in test_tools" in caught.value.message
            assert "hunter2" not in caught.value.message
        with pytest.raises(Unavailable):
            await executor.execute(FakeWork("down"))
        with pytest.raises(StepFailed, match="not JSON"):
            await executor.execute(FakeWork("odd"))
        assert out(await executor.execute(FakeWork("infinite"))) is None
        with pytest.raises(StepFailed) as caught:
            await executor.execute(FakeWork("nobody"))
        assert caught.value.code == "NOT_FOUND"
    with pytest.raises(ValueError, match="gRPC status"):
        ToolError("x", code="TEAPOT")


async def test_a_tool_cannot_take_the_worker_with_it(serve: Serve) -> None:
    @tool
    async def exits() -> None:
        raise SystemExit(1)

    @tool
    def exits_in_a_thread() -> None:
        raise SystemExit(1)

    @tool
    def finds_nothing() -> object:
        return next(iter(()))

    @tool
    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    async with serve(exits, exits_in_a_thread, finds_nothing, cancels_itself) as executor:
        for target in executor.targets():
            with pytest.raises(StepFailed) as caught:
                await executor.execute(FakeWork(target.name))
            assert caught.value.reason == "TOOL_ERROR"


async def test_async_tool_is_cancelled(serve: Serve) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    @tool
    async def hangs() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    @tool
    async def streams() -> AsyncGenerator[int, None]:
        try:
            yield 1
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serve(hangs, streams) as executor:
        for name in ("hangs", "streams"):
            started.clear()
            ended.clear()
            task = asyncio.ensure_future(executor.execute(FakeWork(name)))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended.is_set()


async def test_abandoned_thread_is_not_given_away(serve: Serve) -> None:
    go, started = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    @tool
    def blocks() -> str:
        loop.call_soon_threadsafe(started.set)
        go.wait()
        return "late"

    @tool
    async def light() -> str:
        return "here"

    async with serve(blocks, light, slots=1) as executor:
        assert executor.ready("blocks")
        task = asyncio.ensure_future(executor.execute(FakeWork("blocks")))
        await started.wait()
        assert out(await executor.execute(FakeWork("light"))) == "here"  # the loop is free
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not executor.ready("blocks")
        assert executor.ready("light")
        go.set()
        assert out(await executor.execute(FakeWork("blocks"))) == "late"  # after the abandoned call, in the only thread
        assert executor.ready("blocks")


def test_signatures_that_cannot_be_served() -> None:
    async def untyped(x) -> None: ...  # type: ignore[no-untyped-def]
    async def many(*x: int) -> None: ...
    async def positional(x: int, /) -> None: ...
    async def both(x: Payload, y: int) -> None: ...
    def generator(x: int) -> Any:
        yield x

    for function in (untyped, many, positional, both, generator):
        with pytest.raises(TypeError, match=function.__name__):
            tool(function)
    with pytest.raises(ValueError, match="name"):
        tool(name="a.b")(untyped)


async def test_all_configuration_mistakes_at_once(serve: Serve) -> None:
    @tool(home_region="mars")
    async def far() -> None: ...

    @tool(name="far")
    async def other() -> None: ...

    http = {"name": "api", "url": "http://localhost/{a b}", "headers": {"Authorization": "Bearer ${NO_SUCH_1}", "X": "${NO_SUCH_2}"}}
    with pytest.raises(ConfigError) as caught:
        async with serve(far, other, http=[http], egress_allow=["10.0.0.1/8"]):
            pass
    text = str(caught.value)
    for part in ("mars", "more than one tool 'far'", "NO_SUCH_1", "NO_SUCH_2", "a b", "10.0.0.1/8"):
        assert part in text
    executor = ToolsExecutor(parse({"tools": {"modules": ["no.such.module", "json"]}}))
    with pytest.raises(ConfigError, match=r"no\.such\.module") as caught:
        await executor.start()
    assert "'json' has no function" in str(caught.value)


async def test_sample_tools(serve: Serve) -> None:
    functions = [value for value in runpy.run_path(str(SAMPLE)).values() if hasattr(value, "__nearloop_tool__")]
    async with serve(*functions) as executor:
        assert {target.name for target in executor.targets()} == {"frequent_words", "divide", "spell", "order"}
        assert out(await executor.execute(FakeWork("frequent_words", {"text": "a b A", "top": 1}))) == {"a": 2}
        assert out(await executor.execute(FakeWork("divide", {"dividend": 3, "divisor": 2}))) == 1.5
        with pytest.raises(StepFailed, match="divisor is 0"):
            await executor.execute(FakeWork("divide", {"dividend": 3, "divisor": 0}))
        assert out(await executor.execute(FakeWork("spell", {"text": "ab"}))) == {"tokens": ["a", "b"]}
        assert out(await executor.execute(FakeWork("order", {"article": "x"}, key="k")))["order"] == "k"
        with pytest.raises(StepFailed, match="idempotency key"):
            await executor.execute(FakeWork("order", {"article": "x"}))

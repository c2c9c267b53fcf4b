"""Executes tool steps: Python functions and HTTP requests, side by side."""

import asyncio
import contextvars
import importlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

from gateway.config import Config
from gateway.errors import ConfigError, NearloopError, StepFailed
from gateway.ports import Work
from gateway.types import Kind, Payload, Target
from workers.egress import Egress
from workers.measure import Measurement
from workers.tool_functions import ToolContext, ToolFunction, tools_of
from workers.tool_http import HttpClient, HttpTool


class _Tool(Protocol):
    @property
    def target(self) -> Target: ...

    def ready(self) -> bool: ...

    def execute(self, work: Work) -> Awaitable[Payload]: ...


class Threads:
    """A bounded pool for plain functions that knows how many threads are taken, those of abandoned calls included."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="tool")

    def free(self) -> bool:
        return self._taken < self._size

    async def run(self, function: Callable[[], object]) -> object:
        """Cancelling this does not stop the function once it runs."""
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        future = self._pool.submit(_settable, partial(context.run, function))
        self._taken += 1
        future.add_done_callback(partial(self._ended, loop))
        return await asyncio.wrap_future(future)

    def _ended(self, loop: asyncio.AbstractEventLoop, _: Future[object]) -> None:
        if not loop.is_closed():  # an abandoned call may outlive the worker
            loop.call_soon_threadsafe(self._give_back)

    def _give_back(self) -> None:
        self._taken -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _settable(function: Callable[[], object]) -> object:
    try:
        return function()
    except StopIteration as error:  # asyncio refuses it as a future's exception, and the step would wait for ever
        raise RuntimeError("StopIteration") from error


class _FunctionTool:
    def __init__(self, tool: ToolFunction, target: Target, threads: Threads) -> None:
        self.target = target
        self._tool = tool
        self._threads = threads

    def ready(self) -> bool:
        return not self._tool.threaded or self._threads.free()

    async def execute(self, work: Work) -> Payload:
        tool = self._tool
        arguments = tool.arguments(work.step.input, lambda: self._context(work))
        try:
            if tool.threaded:
                value = await self._threads.run(partial(tool.function, **arguments))
            elif tool.streams:
                return await tool.stream(arguments, work.emit)
            else:
                value = await tool.function(**arguments)
        except NearloopError:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise tool.failure(error) from None  # something inside was cancelled, not the step
        except (Exception, SystemExit) as error:
            # Without `from`: the cause's text may quote the input and would be logged with the traceback.
            raise tool.failure(error) from None
        return tool.output(value)

    def _context(self, work: Work) -> ToolContext:
        emit: Callable[[Payload], object] = work.emit
        progress: Callable[[float, str], object] = work.progress
        if self._tool.threaded:
            # Everything behind Work belongs to the loop.
            loop = asyncio.get_running_loop()
            emit = lambda token: loop.call_soon_threadsafe(work.emit, token)  # noqa: E731
            progress = lambda fraction, message: loop.call_soon_threadsafe(work.progress, fraction, message)  # noqa: E731
        step = work.step
        return ToolContext(
            idempotency_key=step.idempotency_key,
            step_id=step.id,
            tenant=step.tenant,
            attempt=work.attempt,
            run=step.run,
            remaining_s=work.remaining_s,
            progress=progress,
            emit=lambda item: emit(self._tool.output(item)),
        )


class ToolsExecutor:
    """The executor for steps of kind tool: functions of config.tools.modules, requests of config.tools.http.

    environ resolves `${NAME}` in the headers of HTTP tools.
    """

    def __init__(self, config: Config, environ: Mapping[str, str] = os.environ) -> None:
        self._config = config
        self._environ = environ
        self._tools: dict[str, _Tool] = {}
        self._threads: Threads | None = None
        self._client: HttpClient | None = None

    async def start(self) -> None:
        """Imports the modules and resolves headers. Raises ConfigError with everything that is wrong."""
        section = self._config.tools
        problems: list[str] = []
        functions = _functions(section.modules, problems)
        _check_functions(functions, self._config, problems)
        egress = Egress(())
        try:
            egress = Egress(section.egress_allow)
        except ConfigError as error:
            problems += error.problems
        http = [HttpTool(tool, self._config, self._environ, problems) for tool in section.http]
        if problems:
            raise ConfigError("tools", problems)
        self._threads = Threads(section.slots)
        self._client = HttpClient(egress, section.slots)
        tools: list[_Tool] = [_FunctionTool(item, _target(item, self._config), self._threads) for item in functions]
        tools += [tool.bind(self._client) for tool in http]
        self._tools = {tool.target.name: tool for tool in tools}

    async def close(self) -> None:
        """Closes the pooled connections. Functions that still run in threads are left alone."""
        if self._client is not None:
            await self._client.close()
        if self._threads is not None:
            self._threads.close()
        self._tools = {}

    async def probe(self) -> None:
        """Measures the way to the servers of HTTP tools (`workers.measure.Measured`)."""
        if self._client is not None:
            await self._client.probe()

    def answered(self) -> Sequence[Measurement]:
        return self._client.answered() if self._client is not None else ()

    def targets(self) -> Sequence[Target]:
        return [tool.target for tool in self._tools.values()]

    def ready(self, target: str) -> bool:
        """False while every thread is taken, for a tool that needs one."""
        tool = self._tools.get(target)
        return tool is not None and tool.ready()

    def execute(self, work: Work) -> Awaitable[Payload]:
        """Raises InvalidStep, StepFailed, Unavailable."""
        tool = self._tools.get(work.step.target)
        if tool is None:
            raise StepFailed(f"this worker has no tool {work.step.target!r}", code="NOT_FOUND", reason="UNKNOWN_TARGET")
        return tool.execute(work)


def _functions(modules: Sequence[str], problems: list[str]) -> list[ToolFunction]:
    found: dict[int, ToolFunction] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # the module's own code may raise anything
            problems.append(f"tools.modules: {name!r} cannot be imported: {type(error).__name__}: {error}")
            continue
        functions = tools_of(module)
        if not functions:
            problems.append(f"tools.modules: {name!r} has no function marked with @tool")
        found.update({id(function): function for function in functions})
    return list(found.values())


def _check_functions(functions: Sequence[ToolFunction], config: Config, problems: list[str]) -> None:
    names = [tool.options.name for tool in functions] + [tool.name for tool in config.tools.http]
    problems += [f"tools: there is more than one tool {name!r}" for name in sorted(set(names)) if names.count(name) > 1]
    for tool in functions:
        region = tool.options.home_region
        if region is not None and region not in config.region_names:
            problems.append(f"tool {tool.options.name!r}: there is no region {region!r} in [[regions]]")


def _target(tool: ToolFunction, config: Config) -> Target:
    options = tool.options
    return Target(
        kind=Kind.TOOL,
        name=options.name,
        description=options.description,
        home_region=options.home_region or config.region_names[0],
        cost=options.cost,
        slots=options.slots or config.tools.slots,
        timeout_s=options.timeout_s,
        read_only=options.read_only,
        idempotent=options.idempotent,
        input_schema=tool.input_schema,
    )

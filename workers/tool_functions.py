"""Python functions as tools: `@tool`, the JSON Schema of a function's input, and how a call ends.

    @tool(read_only=True, idempotent=True)
    async def area(width: float, height: float = 1.0) -> float:
        \"\"\"The area of a rectangle.\"\"\"
        return width * height

Every parameter needs a type; unknown fields are refused. A parameter annotated `ToolContext` is injected. A function whose only other
parameter is annotated `Payload` takes the input as it was sent, of any content type. What is returned becomes JSON, unless it is a
`Payload`. An async generator streams: each item is a token, and the output is `{"tokens": [...]}`.

A plain function runs in a thread. **It cannot be stopped**: when its step is cancelled or runs out of time, the worker lets go of the
step while the function goes on and keeps its thread. Write what can hang as an async function, which is cancelled.

How a call ends:
- `ToolError` and the errors of `gateway.errors` are the tool's own answer and pass as they are; `Unavailable` returns the step to the
  queue.
- Any other exception, ValueError too (nobody can tell the caller's mistake from the tool's), is INTERNAL with reason TOOL_ERROR.
  Its type and place are told and its text is not, since that may quote the input.
"""

import inspect
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, NotRequired, TypeVar, get_type_hints, overload

import grpc
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python
from typing_extensions import TypedDict

from gateway import subjects
from gateway.errors import StepFailed
from gateway.types import JSON, Payload
from workers.tool_input import fields_of, need_json

F = TypeVar("F", bound=Callable[..., Any])
_ATTRIBUTE = "__nearloop_tool__"


class ToolError(StepFailed):
    """A tool's own answer that it could not do what was asked; message and reason reach the caller. code is a gRPC status name."""

    reason = "TOOL_FAILED"

    def __init__(self, message: str, *, code: str = "FAILED_PRECONDITION", reason: str | None = None) -> None:
        if code == "OK" or code not in grpc.StatusCode.__members__:
            raise ValueError(f"{code!r} is not the name of a gRPC status for an error")
        super().__init__(message, code=code, reason=reason)


@dataclass(frozen=True, slots=True)
class ToolContext:
    """What a tool may know of its step. `attempt` counts from 1; the key is empty when the step has none.

    remaining_s() is the time left; progress(fraction, message) and emit(item) reach those who watch the step.
    """

    idempotency_key: str
    step_id: str
    tenant: str
    attempt: int
    run: str
    remaining_s: Callable[[], float]
    progress: Callable[[float, str], object]
    emit: Callable[[object], object]


@dataclass(frozen=True, slots=True)
class Options:
    """What `@tool` was told; None is decided by the configuration."""

    name: str
    description: str
    read_only: bool
    idempotent: bool
    timeout_s: float
    cost: float
    slots: int | None
    home_region: str | None


class ToolFunction:
    """A function with its options and the schema of its input. Made by `@tool`; raises TypeError for a signature that cannot be served."""

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        self.function = function
        self.options = options
        self.streams = inspect.isasyncgenfunction(function)
        self.threaded = not self.streams and not inspect.iscoroutinefunction(function)
        if inspect.isgeneratorfunction(function):
            raise TypeError(f"tool {options.name!r}: a generator must be an async one")
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        defaults: dict[str, object] = {}
        self._context = self._raw = ""
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"tool {options.name!r}: parameter {parameter.name!r} cannot be given by name")
            if parameter.name not in hints:
                raise TypeError(f"tool {options.name!r}: parameter {parameter.name!r} has no type")
            hint = hints[parameter.name]
            if hint is ToolContext:
                self._context = parameter.name
            elif hint is Payload:
                self._raw = parameter.name
            elif parameter.default is parameter.empty:
                fields[parameter.name] = hint
            else:
                fields[parameter.name] = NotRequired[hint]
                defaults[parameter.name] = parameter.default
        if self._raw and fields:
            raise TypeError(f"tool {options.name!r}: a Payload parameter is the whole input; {', '.join(fields)} cannot stand beside it")
        self.input_schema: dict[str, object] | None = None
        self._adapter: TypeAdapter[dict[str, Any]] | None = None
        if not self._raw:
            self._adapter = _adapter(fields)
            self.input_schema = _schema(self._adapter, defaults)

    def arguments(self, payload: Payload, context: Callable[[], ToolContext]) -> dict[str, Any]:
        """The keyword arguments of a call. Raises InvalidStep."""
        if self._adapter is None:
            arguments: dict[str, Any] = {self._raw: payload}
        else:
            need_json(payload)
            try:
                arguments = self._adapter.validate_json(payload.data)
            except ValidationError as error:
                raise fields_of(error) from None
        if self._context:
            arguments[self._context] = context()
        return arguments

    def output(self, value: object) -> Payload:
        """Raises StepFailed when the value cannot be JSON."""
        return value if isinstance(value, Payload) else Payload(self._json(value))

    def _json(self, value: object) -> bytes:
        try:
            return to_json(value, inf_nan_mode="null")  # JSON has no NaN
        except (PydanticSerializationError, ValueError) as error:
            message = f"tool {self.options.name!r} returned a value that is not JSON ({type(error).__name__})"
            raise StepFailed(message, reason="TOOL_ERROR") from None

    async def stream(self, arguments: dict[str, Any], emit: Callable[[Payload], None]) -> Payload:
        """Runs an async generator to its end; the output holds every token."""
        tokens: list[bytes] = []
        items: AsyncGenerator[object, None] = self.function(**arguments)
        try:
            async for item in items:
                token = self._json(item)
                tokens.append(token)
                emit(Payload(token))
        finally:
            await items.aclose()
        return Payload(b'{"tokens":[' + b",".join(tokens) + b"]}", JSON)

    def failure(self, error: BaseException) -> StepFailed:
        """What an exception of the function stands for: its type and place, not its text."""
        place, trace = "", error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == inspect.unwrap(self.function).__code__.co_filename:
                place = f" in {self.function.__module__}, line {trace.tb_lineno}"
            trace = trace.tb_next
        return StepFailed(f"tool {self.options.name!r} raised {type(error).__name__}{place}", reason="TOOL_ERROR")


def _adapter(fields: dict[str, Any]) -> TypeAdapter[dict[str, Any]]:
    # A TypedDict, since it keeps absent fields absent, so that Python applies the defaults, and has no names that fields could shadow.
    make: Any = TypedDict
    shape = make("Input", fields)
    shape.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return TypeAdapter(shape)


def _schema(adapter: TypeAdapter[dict[str, Any]], defaults: dict[str, object]) -> dict[str, object]:
    schema = adapter.json_schema()
    schema.pop("title", None)
    for name, value in defaults.items():
        schema["properties"][name]["default"] = to_jsonable_python(value)
    return schema


@overload
def tool(function: F, /) -> F: ...


@overload
def tool(
    *,
    name: str = "",
    read_only: bool = False,
    idempotent: bool = False,
    timeout_s: float = 30.0,
    cost: float = 1.0,
    slots: int | None = None,
    home_region: str | None = None,
) -> Callable[[F], F]: ...


def tool(
    function: F | None = None,
    /,
    *,
    name: str = "",
    read_only: bool = False,
    idempotent: bool = False,
    timeout_s: float = 30.0,
    cost: float = 1.0,
    slots: int | None = None,
    home_region: str | None = None,
) -> F | Callable[[F], F]:
    """Marks a function as a tool and leaves it callable as before. Served when its module is listed in tools.modules.

    name defaults to the function's, the description is the docstring's first paragraph. Raises TypeError or ValueError.
    """

    def mark(function: F) -> F:
        chosen = name or function.__name__
        if not subjects.is_id(chosen):
            raise ValueError(f"{chosen!r} is not a tool's name: {subjects.ID_RULE}")
        if timeout_s <= 0 or cost <= 0 or (slots is not None and slots < 1):
            raise ValueError(f"tool {chosen!r}: timeout_s, cost and slots must be positive")
        description = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        options = Options(chosen, description, read_only, idempotent, timeout_s, cost, slots, home_region)
        setattr(function, _ATTRIBUTE, ToolFunction(function, options))
        return function

    return mark if function is None else mark(function)


def tools_of(module: object) -> list[ToolFunction]:
    """The tools among a module's names, each once."""
    found = {id(value): value for item in vars(module).values() if isinstance(value := getattr(item, _ATTRIBUTE, None), ToolFunction)}
    return list(found.values())

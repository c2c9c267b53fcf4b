"""What the tests of the engine share: a hand that drives it step by step, and a small part of the expression language."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.program.allowance import Allowance
from gateway.program.commands import Cancel, Command, Fail, Finish, StartCall, Wait
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Cancelled, Completed, Event, Failed, TimerFired, decode, encode
from gateway.program.model import Block, Call, Expression, Json, Program, Template
from gateway.types import Kind

_OPERATORS = {"<": lambda a, b: a < b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "+": lambda a, b: a + b}


class SmallLanguage:
    """`a.b[0]`, numbers, `true`, `false`, `null`, `size(a.b)`, and `x OP y` of these: the same in CEL, and quick to compile."""

    def compile_expression(self, text: str) -> list[str]:
        return re.split(r"\s+(<|==|!=|\+)\s+", text.strip())

    def evaluate(self, compiled: list[str], variables: Mapping[str, Json], allowance: Allowance | None = None) -> Json:
        if allowance is not None:
            allowance.spend(len(compiled))
        try:
            value = _operand(compiled[0], variables)
            for operator, operand in zip(compiled[1::2], compiled[2::2], strict=True):
                value = _OPERATORS[operator](value, _operand(operand, variables))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(type(error).__name__) from None
        return value

    def compile_template(self, value: Json) -> Json:
        return value

    def render(self, compiled: Json, variables: Mapping[str, Json], allowance: Allowance | None = None) -> Json:
        if isinstance(compiled, dict):
            return {key: self.render(value, variables, allowance) for key, value in compiled.items()}
        if isinstance(compiled, list):
            return [self.render(value, variables, allowance) for value in compiled]
        if isinstance(compiled, str) and compiled.startswith("${"):
            return self.evaluate(self.compile_expression(compiled[2:-1]), variables, allowance)
        return compiled

    def references_of(self, compiled: Any) -> frozenset[str]:
        """Of a template only: what looks like a path in any of its strings."""
        return frozenset(re.findall(r"[a-z]\w*(?:\.\w+)*", str(compiled)))


def _operand(text: str, variables: Mapping[str, Json]) -> Any:
    if text in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[text]
    if text.lstrip("-").isdigit():
        return int(text)
    if text.startswith("size("):
        return len(_operand(text[5:-1], variables))
    value: Any = variables
    for index, name in re.findall(r"\[(\d+)\]|(\w+)", text):
        value = value[int(index)] if index else value[name]
    return value


SMALL = SmallLanguage()


def call(node_id: str, given: Json = None, **more: Any) -> Call:
    return Call(node_id, Kind.TOOL, f"of_{node_id}", Template(given), **more)


def when(text: str) -> Expression:
    return Expression(text)


def program(*steps: Any, **more: Any) -> Program:
    return Program("test", steps, **more)


class Drive:
    """An engine and its journal. `running` and `waiting`: what it asked for that has no outcome; `started`: every StartCall, in order."""

    def __init__(self, what: Program | Block, given: Json = None, events: Iterable[Event] = (), **more: Any) -> None:
        self.program = what if isinstance(what, Program) else Program("test", what)
        self.engine = Engine(self.program, given, Evaluation(SMALL), **more)
        self.journal: list[Event] = []
        self.started: list[StartCall] = []
        self.waits: list[Wait] = []
        self.running: dict[str, StartCall] = {}
        self.waiting: dict[str, Wait] = {}
        self.ended: Finish | Fail | None = None
        self._take(self.engine.start())
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> list[Command]:
        self.journal.append(decode(encode(event)))
        if isinstance(event, TimerFired):
            self.waiting.pop(event.key, None)
        elif isinstance(event, Completed | Failed):
            self.running.pop(event.key, None)
        commands = self.engine.apply(event)
        self._take(commands)
        return commands

    def completes(self, key: str, output: Json = None, **more: Any) -> list[Command]:
        return self.apply(Completed(key, self.running[key].attempt, output, **more))

    def fails(self, key: str, *, retryable: bool = False, **more: Any) -> list[Command]:
        return self.apply(Failed(key, self.running[key].attempt, "UNAVAILABLE", "BROKEN", retryable=retryable, **more))

    def cancelled(self) -> list[Command]:
        return self.apply(Cancelled("enough"))

    @property
    def output(self) -> Json:
        assert isinstance(self.ended, Finish)
        return self.ended.output

    @property
    def failure(self) -> tuple[str, str]:
        assert isinstance(self.ended, Fail)
        return self.ended.error.reason, self.ended.error.step_id

    @property
    def why(self) -> str:
        assert isinstance(self.ended, Fail)
        return str(self.ended.error)

    def _take(self, commands: list[Command]) -> None:
        assert self.ended is None or not commands, "nothing comes after the end"
        for command in commands:
            match command:
                case StartCall():
                    assert command.key not in self.running
                    self.started.append(command)
                    self.running[command.key] = command
                case Wait():
                    self.waits.append(command)
                    self.waiting[command.key] = command
                case Cancel():
                    assert self.running.pop(command.key, None) or self.waiting.pop(command.key, None), "cancels what it asked for"
                case Finish() | Fail():
                    self.ended = command
        if self.ended is None:
            assert {asked.key: asked for asked in self.engine.outstanding()} == {**self.running, **self.waiting}
        else:
            assert self.engine.ended is self.ended
            assert not self.running
            assert not self.waiting
            assert not self.engine.outstanding()

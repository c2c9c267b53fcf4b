"""Programs of tests/programs, in all three ways of writing one, and a hand that executes a program with real expressions."""

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from gateway.edge.program_proto import program_from_proto
from gateway.program import expressions
from gateway.program.commands import Fail, Finish, StartCall, Wait
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Completed, Failed, TimerFired
from gateway.program.model import Json, Program
from gateway.program.parse import load_text
from nearloop.v1 import program_pb2

FOLDER = Path(__file__).parent / "programs"
EXAMPLES = sorted(path for path in FOLDER.iterdir() if path.is_file())

Target = Callable[[Any], Any]


def load_example(path: Path) -> Program:
    if path.suffix == ".py":
        return runpy.run_path(str(path))["program"]
    if path.suffix == ".txtpb":
        return program_from_proto(text_format.Parse(path.read_text(), program_pb2.Program()))
    return load_text(path.read_text(), path.name)


class Unavailable(Exception):
    """A target raises it for an attempt that may be repeated."""


def execute(program: Program, given: Json, targets: Mapping[str, Target]) -> tuple[Json, list[StartCall]]:
    """The output, and every attempt that was made. targets: by scope, `tool.fetch`; from an input to an output."""
    engine = Engine(program, given, Evaluation(expressions))
    waiting, started = list(engine.start()), []
    while waiting:
        command = waiting.pop(0)
        match command:
            case StartCall():
                started.append(command)
                given = json.loads(json.dumps(command.input))  # as it arrives there
                try:
                    output = targets[f"{command.kind.value}.{command.target}"](given)
                except Unavailable:
                    waiting += engine.apply(Failed(command.key, command.attempt, "UNAVAILABLE", "BROKEN", retryable=True))
                else:
                    waiting += engine.apply(Completed(command.key, command.attempt, output, cost=1.0))
            case Wait(is_retry=True):
                waiting += engine.apply(TimerFired(command.key))
            case Finish():
                return command.output, started
            case Fail():
                raise command.error
    raise AssertionError("the run does not end")

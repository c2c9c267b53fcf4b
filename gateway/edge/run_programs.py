"""Programs as clients send them -> parsed and checked ones. The same program comes again and again, so that the last ones are kept.

Reading and checking a large program takes up to seconds, and whoever may call can send one: that is done in a thread, one at a time, while
the gateway goes on.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from gateway.edge import convert
from gateway.edge.program_proto import field_path, program_from_proto
from gateway.edge.schema import FIELD, InputChecker
from gateway.edge.tensor_checks import MAX_PROBLEMS, Problems
from gateway.errors import InvalidStep, StepFailed
from gateway.ports import StepService
from gateway.program.bounds import scopes
from gateway.program.check import check
from gateway.program.dump import dump_program
from gateway.program.model import Program
from gateway.program.parse import load_text
from gateway.program.problems import ProgramInvalid
from gateway.types import Kind, Payload, Target
from nearloop.v1 import gateway_pb2 as pb
from nearloop.v1 import program_pb2

MOST_PROGRAM_BYTES = 256 * 1024
KEPT_PROGRAMS = 256

Targets = Mapping[str, Target]
T = TypeVar("T")


@dataclass(slots=True)
class Known:
    """A program that was read. document: as JSON, as `dump_program` has it. scopes: all that it may call. targets, problems: what it was
    checked against last, and what was wrong then."""

    program: Program
    document: bytes
    scopes: tuple[str, ...]
    targets: Targets | None = None
    problems: Problems = field(default_factory=list)
    inputs: InputChecker = field(default_factory=InputChecker)  # one for each, so that it goes when the program does

    def input_problems(self, payload: Payload, path: str) -> Problems:
        """What is wrong with an input, under `path`."""
        as_target = Target(Kind.RUN, "program", input_schema=self.program.input_schema)
        return [(f"{path}{name.removeprefix(FIELD)}", text) for name, text in self.inputs.problems(as_target, payload)]

    def has_sound_schema(self) -> bool:
        try:
            self.input_problems(Payload(), "")
        except StepFailed:
            return False
        return True


class Programs:
    def __init__(self, service: StepService) -> None:
        self._service = service
        self._kept: OrderedDict[bytes, Known] = OrderedDict()
        self._turn = asyncio.Lock()

    async def known(self, message: pb.RunSpec) -> Known:
        """Raises InvalidStep with all problems, under `run.program` or `run.source`."""
        which = message.WhichOneof("definition")
        if which is None:
            raise InvalidStep([("run.source", "missing: a run needs a program, or its source")])
        raw = message.source.encode() if which == "source" else message.program.SerializeToString(deterministic=True)
        path = f"run.{which}"
        if len(raw) > MOST_PROGRAM_BYTES:
            raise InvalidStep([(path, f"has {len(raw)} bytes; the limit is {MOST_PROGRAM_BYTES}")])
        name = hashlib.sha256(which.encode() + raw).digest()
        known, source = self._kept.get(name), message.source if which == "source" else message.program
        if known is None:
            known = await self._in_thread(lambda: _read(source, path))
            self._keep(name, known)
        else:
            self._kept.move_to_end(name)
        targets = self._targets(known)
        if known.targets != targets:
            catalogue = {status.target.scope: status.target for status in self._service.targets()} | targets
            known.problems = await self._in_thread(lambda: _problems(known, catalogue, source))
            known.targets = targets
        if known.problems:
            raise InvalidStep([(_under(path, place), text) for place, text in known.problems])
        return known

    def _targets(self, known: Known) -> dict[str, Target]:
        """Those of its targets that are there."""
        found = {}
        for scope in known.scopes:
            kind, _, name = scope.partition(".")
            target = self._service.target(Kind(kind), name)
            if target is not None:
                found[scope] = target
        return found

    async def _in_thread(self, work: Callable[[], T]) -> T:
        async with self._turn:
            return await asyncio.to_thread(work)

    def _keep(self, name: bytes, known: Known) -> None:
        self._kept[name] = known
        if len(self._kept) > KEPT_PROGRAMS:
            self._kept.popitem(last=False)


def _read(source: str | program_pb2.Program, path: str) -> Known:
    """Raises InvalidStep."""
    try:
        if isinstance(source, str):
            program = load_text(source, "program.json" if source.lstrip().startswith("{") else "program.yaml")
        else:
            program = program_from_proto(source)
        document = convert.dump_json(dump_program(program))
    except ProgramInvalid as error:
        raise InvalidStep([(_under(path, place), text) for place, text in error.problems]) from None
    except UnicodeEncodeError:
        raise InvalidStep([(path, "has text that is not Unicode")]) from None
    known = Known(program, document, tuple(sorted(scopes(program))))
    if not known.has_sound_schema():
        raise InvalidStep([(_under(path, "input" if isinstance(source, str) else "input_schema"), "is not a JSON Schema that can be used")])
    return known


def _problems(known: Known, catalogue: Targets, source: str | program_pb2.Program) -> Problems:
    """With paths as they are in the source."""
    found = [(one.path, one.text) for one in check(known.program, catalogue) if one.severity == "error"][:MAX_PROBLEMS]
    return found if isinstance(source, str) else [(field_path(source, path), text) for path, text in found]


def _under(path: str, place: str) -> str:
    return f"{path}.{place}" if place else path

"""nearloop.v1.Program messages <-> programs.

A message becomes the plain form that YAML and JSON have too, and goes through the same parser, so that all three mean the same and the
same mistakes are refused. Paths are then put into the message's own terms: what is `steps[0].if` there is `steps[0].choose.condition`.
"""

from gateway.edge.program_reading import Reading
from gateway.edge.program_writing import Writing
from gateway.program.model import Program
from gateway.program.parse import parse_program
from gateway.program.problems import ProgramInvalid
from nearloop.v1 import program_pb2 as pb


def program_from_proto(message: pb.Program) -> Program:
    """Whole numbers of templates become int, up to 2**53. Raises ProgramInvalid with every problem, with paths of the message."""
    reading = Reading()
    plain = reading.program(message)
    problems = reading.problems
    try:
        program = parse_program(plain)
    except ProgramInvalid as invalid:
        problems = [*problems, *((reading.path(path), text) for path, text in invalid.problems)]
    if problems:
        raise ProgramInvalid(problems)
    return program


def field_path(message: pb.Program, path: str) -> str:
    """A path of the plain form, such as a Finding of the checker has, in terms of the message."""
    reading = Reading()
    reading.program(message)
    return reading.path(path)


def program_to_proto(program: Program) -> pb.Program:
    """Times are kept to the nanosecond. Raises ProgramInvalid for whole numbers beyond 2**53, which protobuf cannot hold."""
    writing = Writing()
    message = writing.program(program)
    if writing.problems:
        raise ProgramInvalid(writing.problems)
    return message

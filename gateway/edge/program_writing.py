"""Programs to nearloop.v1.Program messages; what has its default is left out."""

from collections.abc import Iterator
from typing import Any

from google.protobuf import duration_pb2, struct_pb2

from gateway.program.model import MOST_PARALLEL, MOST_STEPS, Agent, Block, Budget, Call, Choose, Loop, Map, Node, Parallel, Program, Retry
from gateway.program.parse import MAP_MOST, UNLIMITED
from nearloop.v1 import program_pb2 as pb

MOST_WHOLE = 2**53  # up to here a double holds every whole number


class Writing:
    """Methods take the path of what they write, in terms of the message. problems: what the message cannot hold."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []

    def program(self, program: Program) -> pb.Program:
        message = pb.Program(name=program.name, description=program.description, regions=program.regions, metadata=program.metadata)
        if program.input_schema is not None:
            message.input_schema.CopyFrom(self.value(dict(program.input_schema), "input_schema").struct_value)
        message.steps.extend(self.block(program.steps, "steps"))
        if program.output is not None:
            message.output.CopyFrom(self.value(program.output.value, "output"))
        if program.most_steps != MOST_STEPS:
            message.limits.steps = program.most_steps
        if program.at_once != MOST_PARALLEL:
            message.limits.at_once = program.at_once
        return message

    def block(self, block: Block, path: str) -> Iterator[pb.Program.Node]:
        for index, node in enumerate(block):
            yield self.node(node, f"{path}[{index}]")

    def node(self, node: Node, path: str) -> pb.Program.Node:
        match node:
            case Call():
                return pb.Program.Node(id=node.id, call=self.call(node, f"{path}.call"))
            case Parallel():
                branches = [
                    pb.Program.Branch(name=name, steps=self.block(block, f"{path}.parallel.branches[{index}].steps"))
                    for index, (name, block) in enumerate(node.branches.items())
                ]
                return pb.Program.Node(id=node.id, parallel=pb.Program.Parallel(branches=branches))
            case Map():
                made = pb.Program.Map(over=node.over.text, item=node.item, steps=self.block(node.body, f"{path}.map.steps"))
                if node.at_once != MOST_PARALLEL:
                    made.at_once = node.at_once
                if node.most != MAP_MOST:
                    made.most = node.most
                return pb.Program.Node(id=node.id, map=made)
            case Choose():
                choose = pb.Program.Choose(
                    condition=node.condition.text,
                    then=self.block(node.then, f"{path}.choose.then"),
                    otherwise=self.block(node.otherwise, f"{path}.choose.otherwise"),
                )
                return pb.Program.Node(id=node.id, choose=choose)
            case Loop():
                loop = pb.Program.Loop(
                    condition=node.condition.text,
                    maximum=node.maximum,
                    steps=self.block(node.body, f"{path}.loop.steps"),
                    stop_quietly=node.stop_quietly,
                )
                return pb.Program.Node(id=node.id, loop=loop)
            case Agent():
                return pb.Program.Node(id=node.id, agent=self.agent(node, f"{path}.agent"))

    def call(self, node: Call, path: str) -> pb.Program.Call:
        message = pb.Program.Call(
            lane=node.lane.value if node.lane is not None else "", input=self.value(node.input.value, f"{path}.input")
        )
        setattr(message, node.kind.value, node.target)
        if node.timeout_s is not None:
            message.timeout.CopyFrom(_duration(node.timeout_s))
        if node.retry != Retry():
            retry = node.retry
            message.retry.attempts, message.retry.factor = retry.attempts, retry.factor
            message.retry.first.CopyFrom(_duration(retry.first_s))
            message.retry.most.CopyFrom(_duration(retry.most_s))
        if node.fallback is not None:
            message.fallback.CopyFrom(self.value(node.fallback.value, f"{path}.fallback"))
        return message

    def agent(self, node: Agent, path: str) -> pb.Program.Agent:
        message = pb.Program.Agent(model=node.model, messages=self.value(node.messages.value, f"{path}.messages"))
        for name, tool in node.tools.items():
            setattr(message.tools.add(name=name, description=tool.description), tool.kind.value, tool.target)
        budget = node.budget
        if budget != Budget():
            message.budget.iterations, message.budget.tokens = budget.iterations, budget.tokens
            message.budget.wall.CopyFrom(_duration(budget.wall_s))
            if budget.cost != UNLIMITED:
                message.budget.cost = budget.cost
        return message

    def value(self, value: Any, path: str) -> struct_pb2.Value:
        if isinstance(value, dict):
            fields = {key: self.value(item, f"{path}.{key}") for key, item in value.items()}
            return struct_pb2.Value(struct_value=struct_pb2.Struct(fields=fields))
        if isinstance(value, list | tuple):
            items = [self.value(item, f"{path}[{index}]") for index, item in enumerate(value)]
            return struct_pb2.Value(list_value=struct_pb2.ListValue(values=items))
        if value is None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        if isinstance(value, bool):
            return struct_pb2.Value(bool_value=value)
        if isinstance(value, str):
            return struct_pb2.Value(string_value=value)
        if isinstance(value, int) and abs(value) > MOST_WHOLE:
            self.problems.append((path, "is a whole number beyond 2^53, which protobuf cannot hold: write it as a text"))
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        return struct_pb2.Value(number_value=value)


def _duration(seconds: float) -> duration_pb2.Duration:
    whole, nanos = divmod(round(seconds * 10**9), 10**9)
    return duration_pb2.Duration(seconds=whole, nanos=nanos)

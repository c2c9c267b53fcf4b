"""nearloop.v1.Program messages to the plain form of programs, and where each part of it came from."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf import duration_pb2, struct_pb2

from gateway.edge.convert import value_from_proto
from gateway.program.parse import VERSION
from gateway.program.text import MOST_DEPTH
from nearloop.v1 import program_pb2 as pb

Plain = dict[str, Any]

TARGETS = ("infer", "tool", "retrieve")
SAFE = {"tool": "unknown"}  # stands for a target that is missing, so that the parser says nothing more of it
FORMS = ("call", "parallel", "map", "choose", "loop", "agent")

# Where a field of a node's plain form is in the message; what is not here has the same name in both.
PLACES: dict[str, dict[str, str]] = {
    "call": {
        **{key: f"call.{key}" for key in (*TARGETS, "input", "lane", "timeout", "retry", "fallback")},
        "retry.first_s": "call.retry.first",
        "retry.most_s": "call.retry.most",
    },
    "parallel": {},
    "map": {"map.as": "map.item"},
    "choose": {"if": "choose.condition", "then": "choose.then", "else": "choose.otherwise"},
    "loop": {"while": "loop.condition", **{key: f"loop.{key}" for key in ("maximum", "steps", "stop_quietly")}},
    "agent": {
        "agent": "agent.model",
        **{key: f"agent.{key}" for key in ("messages", "tools", "budget")},
        "budget.wall_s": "agent.budget.wall",
    },
}


class Reading:
    """Methods take the path of what they read in the plain form and in the message. problems: those that the plain form cannot show."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []
        self._places: dict[str, str] = {}

    def path(self, plain: str) -> str:
        """By the longest part of it that is known."""
        for end in range(len(plain), 0, -1):
            if plain[end : end + 1] in ("", ".", "[") and plain[:end] in self._places:
                return self._places[plain[:end]] + plain[end:]
        return plain

    def program(self, message: pb.Program) -> Plain:
        self._places["input"] = "input_schema"
        limits = _present(message.limits, ("steps", "at_once"))
        return {
            "program": VERSION,
            **_filled(message, ("name", "description")),
            **({"input": self.struct(message.input_schema, "input_schema")} if message.HasField("input_schema") else {}),
            "steps": self.block(message.steps, "steps", "steps"),
            **({"output": self.value(message.output, "output")} if message.HasField("output") else {}),
            "limits": limits,
            "regions": list(message.regions),
            "metadata": {key: message.metadata[key] for key in sorted(message.metadata)},
        }

    def block(self, nodes: Iterable[pb.Program.Node], plain: str, proto: str, depth: int = 0) -> list[Plain]:
        if depth > MOST_DEPTH:  # deeper than the parser allows, which will say so
            return []
        return [self.node(node, f"{plain}[{index}]", f"{proto}[{index}]", depth + 1) for index, node in enumerate(nodes)]

    def node(self, message: pb.Program.Node, plain: str, proto: str, depth: int) -> Plain:
        self._places[plain] = proto
        form = message.WhichOneof("form")
        if form is None:
            self.problems.append((proto, f"needs one of {', '.join(FORMS)}"))
            return {**_filled(message, ("id",)), **SAFE}
        self._places |= {f"{plain}.{key}": f"{proto}.{place}" for key, place in PLACES[form].items()}
        made, place = _filled(message, ("id",)), f"{proto}.{form}"
        if form == "call":
            return made | self.call(message.call, place)
        if form == "parallel":
            return made | self.parallel(message.parallel, plain, place, depth)
        if form == "map":
            return made | self.map(message.map, plain, place, depth)
        if form == "choose":
            return made | self.choose(message.choose, plain, place, depth)
        return made | (self.loop(message.loop, plain, place, depth) if form == "loop" else self.agent(message.agent, plain, place))

    def call(self, message: pb.Program.Call, proto: str) -> Plain:
        retry = _present(message.retry, ("attempts", "factor"))
        retry |= self.seconds(message.retry, "first", "first_s", f"{proto}.retry")
        retry |= self.seconds(message.retry, "most", "most_s", f"{proto}.retry")
        return {
            **self.target(message, proto),
            **({"input": self.value(message.input, f"{proto}.input")} if message.HasField("input") else {}),
            **_filled(message, ("lane",)),
            **self.seconds(message, "timeout", "timeout", proto),
            "retry": retry,
            **({"fallback": self.value(message.fallback, f"{proto}.fallback")} if message.HasField("fallback") else {}),
        }

    def parallel(self, message: pb.Program.Parallel, plain: str, proto: str, depth: int) -> Plain:
        branches: Plain = {}
        for index, branch in enumerate(message.branches):
            place = f"{proto}.branches[{index}]"
            if branch.name in branches:
                self.problems.append((f"{place}.name", "is the name of another branch"))
            self._places[f"{plain}.parallel.{branch.name}"] = place
            branches[branch.name] = self.block(branch.steps, f"{plain}.parallel.{branch.name}", f"{place}.steps", depth)
        return {"parallel": branches}

    def map(self, message: pb.Program.Map, plain: str, proto: str, depth: int) -> Plain:
        return {
            "map": {
                **_filled(message, ("over",)),
                **({"as": message.item} if message.item else {}),
                "steps": self.block(message.steps, f"{plain}.map.steps", f"{proto}.steps", depth),
                **_present(message, ("at_once", "most")),
            }
        }

    def choose(self, message: pb.Program.Choose, plain: str, proto: str, depth: int) -> Plain:
        return {
            **self.condition("if", message, proto),
            "then": self.block(message.then, f"{plain}.then", f"{proto}.then", depth),
            "else": self.block(message.otherwise, f"{plain}.else", f"{proto}.otherwise", depth),
        }

    def loop(self, message: pb.Program.Loop, plain: str, proto: str, depth: int) -> Plain:
        steps = self.block(message.steps, f"{plain}.steps", f"{proto}.steps", depth)
        return {
            **self.condition("while", message, proto),
            **_present(message, ("maximum",)),
            "steps": steps,
            "stop_quietly": message.stop_quietly,
        }

    def agent(self, message: pb.Program.Agent, plain: str, proto: str) -> Plain:
        tools: Plain = {}
        for index, tool in enumerate(message.tools):
            place = f"{proto}.tools[{index}]"
            if tool.name in tools:
                self.problems.append((f"{place}.name", "is the name of another tool"))
            self._places[f"{plain}.tools.{tool.name}"] = place
            tools[tool.name] = {**self.target(tool, place), **_filled(tool, ("description",))}
        budget = _present(message.budget, ("iterations", "cost", "tokens"))
        return {
            "agent": message.model,
            **({"messages": self.value(message.messages, f"{proto}.messages")} if message.HasField("messages") else {}),
            "tools": tools,
            "budget": budget | self.seconds(message.budget, "wall", "wall_s", f"{proto}.budget"),
        }

    def condition(self, key: str, message: pb.Program.Choose | pb.Program.Loop, proto: str) -> Plain:
        if not message.condition:
            self.problems.append((f"{proto}.condition", "is missing"))
        return {key: message.condition}

    def target(self, message: pb.Program.Call | pb.Program.Tool, proto: str) -> Plain:
        kind = message.WhichOneof("target")
        if kind is None:
            self.problems.append((proto, f"needs one of {', '.join(TARGETS)}"))
            return SAFE
        return {kind: getattr(message, kind)}

    def seconds(self, message: Any, field: str, key: str, proto: str) -> Plain:
        if not message.HasField(field):
            return {}
        duration: duration_pb2.Duration = getattr(message, field)
        if abs(duration.nanos) > 999_999_999 or duration.seconds * duration.nanos < 0:
            self.problems.append((f"{proto}.{field}", "is no duration: seconds and nanos need the same sign, and nanos less than a second"))
            return {}
        return {key: (duration.seconds * 10**9 + duration.nanos) / 10**9}

    def value(self, message: struct_pb2.Value, proto: str, depth: int = 0) -> object:
        which = message.WhichOneof("kind")
        if depth > MOST_DEPTH:  # as in block
            return None
        if which is None:
            self.problems.append((proto, "is a Value in which nothing is set: set null_value for null"))
        elif which == "struct_value":
            return self.struct(message.struct_value, proto, depth)
        elif which == "list_value":
            return [self.value(item, f"{proto}[{index}]", depth + 1) for index, item in enumerate(message.list_value.values)]
        elif which == "number_value" and not math.isfinite(message.number_value):
            return message.number_value  # the parser says what is wrong with it
        return value_from_proto(message)

    def struct(self, message: struct_pb2.Struct, proto: str, depth: int = 0) -> Plain:
        """Sorted: a Struct has no order, and the same one sent again must be the same program."""
        return {key: self.value(message.fields[key], f"{proto}.{key}", depth + 1) for key in sorted(message.fields)}


def _filled(message: Any, fields: Sequence[str]) -> Plain:
    """Strings that are not empty, which is how a message says that there is none."""
    return {field: getattr(message, field) for field in fields if getattr(message, field)}


def _present(message: Any, fields: Sequence[str]) -> Plain:
    return {field: getattr(message, field) for field in fields if message.HasField(field)}

"""A Program as plain values, the inverse of `parse_program`; what has its default is left out."""

from collections.abc import Callable, Mapping
from typing import Any

from gateway.program.model import Agent, Block, Budget, Call, Choose, Loop, Map, Node, Parallel, Program, Retry
from gateway.program.parse import VERSION

Plain = dict[str, Any]


def dump_program(program: Program) -> Plain:
    limits = _changed(program, Program, {"most_steps": "steps", "at_once": "at_once"})
    return {
        "program": VERSION,
        "name": program.name,
        **({"description": program.description} if program.description else {}),
        **({"input": dict(program.input_schema)} if program.input_schema is not None else {}),
        "steps": _block(program.steps),
        **({"output": program.output.value} if program.output is not None else {}),
        **({"limits": limits} if limits else {}),
        **({"regions": list(program.regions)} if program.regions else {}),
        **({"metadata": dict(program.metadata)} if program.metadata else {}),
    }


def _block(block: Block) -> list[Plain]:
    return [{"id": node.id, **_FORMS[type(node)](node)} for node in block]


def _call(node: Call) -> Plain:
    retry = _same(node.retry, Retry)
    return {
        node.kind.value: node.target,
        "input": node.input.value,
        **({"lane": node.lane.value} if node.lane is not None else {}),
        **({"timeout": node.timeout_s} if node.timeout_s is not None else {}),
        **({"retry": retry} if retry else {}),
        **({"fallback": node.fallback.value} if node.fallback is not None else {}),
    }


def _parallel(node: Parallel) -> Plain:
    return {"parallel": {name: _block(block) for name, block in node.branches.items()}}


def _map(node: Map) -> Plain:
    numbers = _changed(node, Map, {"at_once": "at_once", "most": "most"})
    return {"map": {"over": node.over.text, "as": node.item, "steps": _block(node.body), **numbers}}


def _choose(node: Choose) -> Plain:
    otherwise = {"else": _block(node.otherwise)} if node.otherwise else {}
    return {"if": node.condition.text, "then": _block(node.then), **otherwise}


def _loop(node: Loop) -> Plain:
    quietly = {"stop_quietly": True} if node.stop_quietly else {}
    return {"while": node.condition.text, "maximum": node.maximum, "steps": _block(node.body), **quietly}


def _agent(node: Agent) -> Plain:
    tools = {
        name: {tool.kind.value: tool.target, **({"description": tool.description} if tool.description else {})}
        for name, tool in node.tools.items()
    }
    budget = _same(node.budget, Budget)
    return {"agent": node.model, "messages": node.messages.value, "tools": tools, **({"budget": budget} if budget else {})}


def _same(value: Retry | Budget, of: type[Retry] | type[Budget]) -> Plain:
    return _changed(value, of, {name: name for name in of.__dataclass_fields__})


def _changed(value: object, of: type[Any], names: Mapping[str, str]) -> Plain:
    """Fields that do not have their default, by the names of the plain form."""
    fields = of.__dataclass_fields__
    return {key: getattr(value, name) for name, key in names.items() if getattr(value, name) != fields[name].default}


_FORMS: dict[type[Node], Callable[[Any], Plain]] = {
    Call: _call,
    Parallel: _parallel,
    Map: _map,
    Choose: _choose,
    Loop: _loop,
    Agent: _agent,
}

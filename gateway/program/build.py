"""Programs written in Python, so that they read like the loop that they describe:

    from gateway.program.build import Program

    p = Program("answer")
    search = p.retrieve("search", "docs", text=p.input.question, limit=3, retry=3, fallback={"hits": []})
    with p.when("enough", search.hits.size() > 0) as enough:
        p.tool("page", "fetch", id=search.hits[0].id)
    think = p.infer("think", "plan", prompt=f"Question: {p.input.question}\\nPage: {enough.output}")
    p.output(answer=think.text, sources=search.hits.map(lambda hit: hit.id))
    program = p.build()

The first argument of each method is the step's id. A call gives a Ref to its output; what opens a block gives an object whose `output` is
one. Inputs, fallbacks, messages and outputs are JSON values in which Refs may stand, and f-strings with Refs.

Nothing is executed here: `build` checks the whole program, as a gateway will.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from gateway.program import model, write
from gateway.program.build_blocks import LOOP, Block, Branches, Each, If, Repeat, Steps, output_of
from gateway.program.check import check
from gateway.program.model import MOST_PARALLEL, MOST_STEPS, Budget, Retry, Tool
from gateway.program.parse import MAP_MOST, VERSION, parse_program
from gateway.program.problems import ProgramInvalid
from gateway.program.refs import Ref, cel, if_else, literal, null, roots, to_ref
from gateway.types import Kind, Lane

__all__ = ["Budget", "Kind", "Lane", "Program", "ProgramInvalid", "Ref", "Retry", "Tool", "if_else", "literal", "null"]

NONE: Any = object()  # nothing is given, as opposed to null


class Program:
    """Records steps, in the order in which its methods are called."""

    def __init__(
        self,
        name: str,
        *,
        description: str = "",
        input_schema: Mapping[str, object] | None = None,
        regions: Iterable[str] = (),
        most_steps: int = MOST_STEPS,
        at_once: int = MOST_PARALLEL,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """input_schema: a JSON Schema. regions that a run must not leave; none for any. at_once: steps at a time."""
        steps: Steps = []
        self._open: list[Block] = []  # what is recorded goes to the last one
        self._open.append(Block(self._open, "", steps))
        self._plain: dict[str, Any] = {
            "program": VERSION,
            "name": name,
            "description": description,
            **({"input": dict(input_schema)} if input_schema is not None else {}),
            "steps": steps,
            "limits": {"steps": most_steps, "at_once": at_once},
            "regions": list(regions),
            "metadata": dict(metadata or {}),
        }

    @property
    def input(self) -> Ref:
        return Ref("input", roots=frozenset({"input"}))

    # --- calls ---

    def tool(self, id: str, tool: str, input: object = NONE, /, **more: Any) -> Ref:
        """One step; gives its output.

        input: a template; else it is the object of all keyword arguments but these: lane, timeout_s, retry (attempts in all, or a Retry),
        fallback (the output when the step fails for good; None is one).
        """
        return self._call(Kind.TOOL, id, tool, input, **more)

    def infer(self, id: str, model: str, input: object = NONE, /, **more: Any) -> Ref:
        """As `tool`, for a model."""
        return self._call(Kind.INFER, id, model, input, **more)

    def retrieve(self, id: str, collection: str, input: object = NONE, /, **more: Any) -> Ref:
        """As `tool`, for a collection."""
        return self._call(Kind.RETRIEVE, id, collection, input, **more)

    def agent(self, id: str, model: str, *, messages: object, tools: Mapping[str, Tool], budget: Budget | None = None) -> Ref:
        """A loop in which the model calls tools until it answers; gives {"answer", "messages", "iterations"}."""
        told = {name: {tool.kind.value: tool.target, "description": tool.description} for name, tool in tools.items()}
        return self._add(id, {"agent": model, "messages": self._template(messages), "tools": told, "budget": asdict(budget or Budget())})

    # --- blocks ---

    def when(self, id: str, condition: Ref | bool) -> If:
        """`with p.when(...) as found:` holds what is done when the condition is true, `with found.otherwise():` what is done else."""
        then: Steps = []
        otherwise: Steps = []
        self._add(id, {"if": self._expression(condition), "then": then, "else": otherwise})
        return If(self._open, id, then, otherwise)

    def parallel(self, id: str) -> Branches:
        """`with p.parallel("gather") as gather:`, and in it `with gather.branch("prices"):` for each branch."""
        branches: dict[str, Steps] = {}
        self._add(id, {"parallel": branches})
        return Branches(self._open, id, branches)

    def map(self, id: str, over: object, *, item: str = "", at_once: int = MOST_PARALLEL, most: int = MAP_MOST) -> Each:
        """`with p.map("each", p.input.shops) as each:` holds what is done for `each.item`. item: its name in the program's text."""
        item, body = item or f"{id}_item"[-64:], Steps()
        self._add(id, {"map": {"over": self._expression(over), "as": item, "steps": body, "at_once": at_once, "most": most}})
        return Each(self._open, id, body, item)

    def loop(self, id: str, condition: Callable[[Repeat], Ref | bool], *, maximum: int, stop_quietly: bool = False) -> Repeat:
        """`with p.loop("refine", lambda loop: loop.index < 3, maximum=4) as loop:` holds what is done while the condition is true."""
        loop = Repeat(self._open, id, [])
        with loop:
            asked = self._expression(condition(loop))
        self._add(id, {"while": asked, "maximum": maximum, "steps": loop.steps, "stop_quietly": stop_quietly})
        return loop

    # --- the end ---

    def output(self, value: object = NONE, /, **fields: object) -> None:
        """Of the program, a template; without it, the last output of its steps."""
        if (value is NONE) != bool(fields):
            raise TypeError("the output is either one value or an object of keyword arguments")
        self._plain["output"] = self._template(fields if value is NONE else value)

    def build(self) -> model.Program:
        """Raises ProgramInvalid with everything that is wrong."""
        if len(self._open) > 1:
            raise RuntimeError("the program is not complete: it is built inside of a `with` block of its own")
        program = parse_program(self._plain)
        errors = [(finding.path, finding.text) for finding in check(program) if finding.severity == "error"]
        if errors:
            raise ProgramInvalid(errors)
        return program

    def yaml(self) -> str:
        """As a text. Raises ProgramInvalid."""
        return write.to_yaml(self.build())

    def json(self) -> str:
        """As a text. Raises ProgramInvalid."""
        return write.to_json(self.build())

    def _call(
        self,
        kind: Kind,
        id: str,
        target: str,
        input: object,
        /,
        *,
        lane: Lane | str | None = None,
        timeout_s: float | None = None,
        retry: Retry | int = 1,
        fallback: object = NONE,
        **fields: object,
    ) -> Ref:
        if input is not NONE and fields:
            raise TypeError(f"{id}: its input is given as a whole and as {', '.join(fields)}")
        node: dict[str, Any] = {
            kind.value: target,
            "input": self._template(fields if input is NONE else input),
            "retry": asdict(retry) if isinstance(retry, Retry) else {"attempts": retry},
        }
        if lane is not None:
            node["lane"] = lane.value if isinstance(lane, Lane) else lane
        if timeout_s is not None:
            node["timeout"] = timeout_s
        if fallback is not NONE:
            node["fallback"] = self._template(fallback)
        return self._add(id, node)

    def _add(self, id: str, node: dict[str, Any]) -> Ref:
        self._open[-1].steps.append({"id": id, **node})
        return output_of(id)

    def _expression(self, value: object) -> str:
        expression = to_ref(value)
        self._check_loop(expression)
        return cel(expression)

    def _template(self, value: object) -> Any:
        if isinstance(value, Ref):
            self._check_loop(value)
            return str(value)
        if isinstance(value, str) and "$${" in value:
            raise ValueError("`$${` is the text `${`: write {literal('$')} for a `$` before a reference, and {literal('${')} for that text")
        if isinstance(value, Mapping):
            return {key: self._template(item) for key, item in value.items()}
        return [self._template(item) for item in value] if isinstance(value, list | tuple) else value

    def _check_loop(self, value: Ref) -> None:
        """In the text `loop` is the innermost one, so what was taken from another would silently be of that."""
        inner = next((block.id for block in reversed(self._open) if isinstance(block, Repeat)), None)
        others = {root.removeprefix(LOOP) for root in roots(value) if root.startswith(LOOP)} - {inner}
        if others and inner is not None:
            raise ValueError(
                f"index and last of `{min(others)}` cannot be seen in `{inner}`: give them to a step before it, and use its output"
            )

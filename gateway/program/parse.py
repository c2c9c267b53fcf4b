"""Plain values, from YAML, JSON or a client, to a Program. Says everything that is wrong at once; `check` says what is wrong with what
the expressions and targets mean.

A program is a mapping: `program: nearloop/v1`, `name`, `steps`, and where wanted `description`, `input` (a JSON schema), `output`,
`limits: {steps, at_once}`, `regions`, `metadata`. A step is a mapping with an `id` and one of these:

    infer | tool | retrieve: TARGET    input, lane, timeout (seconds), retry: {attempts, first_s, most_s, factor}, fallback
    parallel: {BRANCH: [steps]}
    map: {over: EXPRESSION, as: NAME, steps: [steps], at_once, most}
    if: EXPRESSION                     then: [steps], else: [steps]
    while: EXPRESSION                  maximum, steps: [steps], stop_quietly
    agent: MODEL                       messages, tools: {NAME: {tool | retrieve | infer: TARGET, description}},
                                       budget: {iterations, cost, tokens, wall_s}
"""

from collections.abc import Mapping
from types import MappingProxyType

from gateway.program.model import (
    MOST_PARALLEL,
    MOST_STEPS,
    Agent,
    Block,
    Budget,
    Call,
    Choose,
    Loop,
    Map,
    Node,
    Parallel,
    Program,
    Retry,
    Tool,
)
from gateway.program.problems import ProgramInvalid, nearest
from gateway.program.reader import NAMES_OF_OURS, Reader, join
from gateway.program.text import MOST_DEPTH, depth, read
from gateway.types import Kind, Lane

VERSION = "nearloop/v1"
TOP = ("program", "name", "description", "input", "steps", "output", "limits", "regions", "metadata")
CALLS = {kind.value: kind for kind in (Kind.INFER, Kind.TOOL, Kind.RETRIEVE)}
CALL_KEYS = ("input", "lane", "timeout", "retry", "fallback")
FORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(CALLS, CALL_KEYS),
    "parallel": (),
    "map": (),
    "if": ("then", "else"),
    "while": ("maximum", "steps", "stop_quietly"),
    "agent": ("messages", "tools", "budget"),
}
MOST_S = 7 * 24 * 3600.0
UNLIMITED = float("inf")
MAP_MOST = 100  # the default of Map.most
MOST_NODES = 1000  # written down


def load_text(text: str, name: str) -> Program:
    """A program from a YAML or JSON text; the suffix of the name says which. Raises ProgramInvalid."""
    return parse_program(read(text, name))


def parse_program(data: object) -> Program:
    """Raises ProgramInvalid with every problem."""
    if depth(data) > MOST_DEPTH:
        raise ProgramInvalid([("", f"nests more than {MOST_DEPTH} deep")])
    parser = _Parser()
    program = parser.program(data)
    if parser.problems:
        raise ProgramInvalid(parser.problems)
    return program


class _Parser(Reader):
    _nodes = 0

    def program(self, data: object) -> Program:
        top = self.table(data, "", TOP)
        if isinstance(data, Mapping):
            for key in ("program", "name", "steps"):
                if key not in top:
                    self.say(key, f"is missing: write `program: {VERSION}`" if key == "program" else "is missing")
        if "program" in top and top["program"] != VERSION:
            self.say("program", f"must be `{VERSION}`")
        limits = self.table(top.get("limits", {}), "limits", ("steps", "at_once"))
        metadata = self.table(top.get("metadata", {}), "metadata")
        return Program(
            name=self.name(top["name"], "name") if "name" in top else "",
            steps=self.block(top["steps"], "steps") if "steps" in top else (),
            output=self.template(top["output"], "output") if "output" in top else None,
            input_schema=self._schema(top["input"]) if "input" in top else None,
            most_steps=self.whole(limits.get("steps", MOST_STEPS), "limits.steps", 1, MOST_STEPS),
            at_once=self.whole(limits.get("at_once", MOST_PARALLEL), "limits.at_once", 1, MOST_PARALLEL),
            regions=tuple(self.name(r, f"regions[{i}]") for i, r in enumerate(self.items(top.get("regions", []), "regions"))),
            description=self.text(top.get("description", ""), "description"),
            metadata=MappingProxyType({key: self.text(value, join("metadata", key)) for key, value in metadata.items()}),
        )

    def _schema(self, value: object) -> Mapping[str, object]:
        schema = self.table(value, "input")
        self.json(value, "input")
        return dict(schema)

    def block(self, value: object, path: str, may_be_empty: bool = False) -> Block:
        items = self.items(value, path)
        if isinstance(value, list | tuple) and not items and not may_be_empty:
            self.say(path, "has no steps")
        self._nodes += len(items)
        if self._nodes > MOST_NODES:
            self.say(path, f"has too many steps: a program has at most {MOST_NODES}")
            return ()
        nodes = [self.node(item, f"{path}[{index}]") for index, item in enumerate(items)]
        return tuple(node for node in nodes if node is not None)

    def node(self, value: object, path: str) -> Node | None:
        step = self.table(value, path)
        if not isinstance(value, Mapping):
            return None
        forms = [form for form in FORMS if form in step]
        if len(forms) != 1:
            known = [*FORMS, *{key for keys in FORMS.values() for key in keys}, "id"]
            unknown = next((key for key in step if key not in known), "")
            hint = f"; there is no `{unknown}`{nearest(unknown, FORMS)}" if unknown and not forms else ""
            self.say(path, f"needs one of {', '.join(FORMS)}{hint}" if not forms else f"has both {' and '.join(forms[:2])}: one is allowed")
            return None
        form = forms[0]
        self.table(step, path, ("id", form, *FORMS[form]))
        if "id" not in step:
            self.say(join(path, "id"), "is missing")
        node_id = self.identifier(step["id"], join(path, "id")) if "id" in step else ""
        if form in CALLS:
            return self.call(node_id, CALLS[form], form, step, path)
        if form == "parallel":
            return self.parallel(node_id, step, path)
        if form == "map":
            return self.map(node_id, step, path)
        if form == "if":
            condition = self.expression(step["if"], join(path, "if"))
            then = self.block(self.needed(step, "then", path, []), join(path, "then"), may_be_empty=True)
            return Choose(node_id, condition, then, self.block(step.get("else", []), join(path, "else"), may_be_empty=True))
        return self.loop(node_id, step, path) if form == "while" else self.agent(node_id, step, path)

    def call(self, node_id: str, kind: Kind, form: str, step: Mapping[str, object], path: str) -> Call:
        lane = step.get("lane")
        timeout_s = step.get("timeout")
        return Call(
            node_id,
            kind,
            self.name(step[form], join(path, form)),
            self.template(step.get("input", {}), join(path, "input")),
            lane=None if lane is None else self.choice(lane, join(path, "lane"), {lane.value: lane for lane in Lane}, None),
            timeout_s=None if timeout_s is None else self.number(timeout_s, join(path, "timeout"), 0.001, MOST_S),
            retry=self.retry(step.get("retry", {}), join(path, "retry")),
            fallback=self.template(step["fallback"], join(path, "fallback")) if "fallback" in step else None,
        )

    def retry(self, value: object, path: str) -> Retry:
        table = self.table(value, path, ("attempts", "first_s", "most_s", "factor"))
        return Retry(
            attempts=self.whole(table.get("attempts", Retry().attempts), join(path, "attempts"), 1, 20),
            first_s=self.number(table.get("first_s", Retry().first_s), join(path, "first_s"), 0, MOST_S),
            most_s=self.number(table.get("most_s", Retry().most_s), join(path, "most_s"), 0, MOST_S),
            factor=self.number(table.get("factor", Retry().factor), join(path, "factor"), 1, 100),
        )

    def parallel(self, node_id: str, step: Mapping[str, object], path: str) -> Parallel:
        path = join(path, "parallel")
        table = self.table(step["parallel"], path)
        if isinstance(step["parallel"], Mapping) and not table:
            self.say(path, "has no branches")
        branches = {}
        for name, steps in table.items():
            branches[self.identifier(name, join(path, name))] = self.block(steps, join(path, name))
        return Parallel(node_id, branches)

    def map(self, node_id: str, step: Mapping[str, object], path: str) -> Map:
        path = join(path, "map")
        table = self.table(step["map"], path, ("over", "as", "steps", "at_once", "most"))
        return Map(
            node_id,
            self.expression(self.needed(table, "over", path, "[]"), join(path, "over")),
            self.identifier(self.needed(table, "as", path, "item"), join(path, "as"), NAMES_OF_OURS),
            self.block(self.needed(table, "steps", path, []), join(path, "steps"), may_be_empty="steps" not in table),
            at_once=self.whole(table.get("at_once", MOST_PARALLEL), join(path, "at_once"), 1, MOST_PARALLEL),
            most=self.whole(table.get("most", MAP_MOST), join(path, "most"), 1, MOST_STEPS),
        )

    def loop(self, node_id: str, step: Mapping[str, object], path: str) -> Loop:
        if "maximum" not in step:
            self.say(join(path, "maximum"), "is missing: a loop without a maximum is not bounded")
        return Loop(
            node_id,
            self.expression(step["while"], join(path, "while")),
            self.whole(step.get("maximum", 1), join(path, "maximum"), 1, MOST_STEPS),
            self.block(self.needed(step, "steps", path, []), join(path, "steps"), may_be_empty="steps" not in step),
            stop_quietly=self.flag(step.get("stop_quietly", False), join(path, "stop_quietly")),
        )

    def agent(self, node_id: str, step: Mapping[str, object], path: str) -> Agent:
        tools = {}
        for name, value in self.table(step.get("tools", {}), join(path, "tools")).items():
            place = f"{path}.tools.{name}"
            table = self.table(value, place, (*CALLS, "description"))
            forms = [form for form in CALLS if form in table]
            if len(forms) != 1:
                self.say(place, f"needs one of {', '.join(CALLS)}")
                continue
            target = self.name(table[forms[0]], join(place, forms[0]))
            tools[self.name(name, place)] = Tool(CALLS[forms[0]], target, self.text(table.get("description", ""), f"{place}.description"))
        place = join(path, "budget")
        budget = self.table(step.get("budget", {}), place, ("iterations", "cost", "tokens", "wall_s"))
        return Agent(
            node_id,
            self.name(step["agent"], join(path, "agent")),
            self.template(self.needed(step, "messages", path, []), join(path, "messages")),
            tools,
            Budget(
                iterations=self.whole(budget.get("iterations", Budget().iterations), join(place, "iterations"), 1, MOST_STEPS),
                cost=self.number(budget.get("cost", UNLIMITED), join(place, "cost"), 0, UNLIMITED),
                tokens=self.whole(budget.get("tokens", Budget().tokens), join(place, "tokens"), 1, 10**9),
                wall_s=self.number(budget.get("wall_s", Budget().wall_s), join(place, "wall_s"), 0.001, MOST_S),
            ),
        )

    def needed(self, table: Mapping[str, object], key: str, path: str, otherwise: object) -> object:
        if key not in table:
            self.say(join(path, key), "is missing")
            return otherwise
        return table[key]

"""The parts of a program as frozen values, after parsing: what a run executes, in which order, with which limits.

A block is a tuple of nodes that are executed one after the other. Every node has an id, unique in the program. What a node gave is
`steps.<id>.output` for the nodes after it in its block and in blocks inside of them; what is inside a node of several blocks is seen
from outside only through that node's output:

    Call       the output of its step
    Parallel   an object with the last output of each branch
    Map        a list with the last output of the body for each item, in the order of the items
    Choose     the last output of the branch that was taken; null when that is empty
    Loop       the last output of the last iteration; null when there was none
    Agent      {"answer": ..., "messages": [...], "iterations": n}

An expression is CEL over `input`, `steps`, the item of each enclosing map by its name, and `loop.index` (from 0) and `loop.last` (the
last output of the iteration before, null in the first) of the nearest enclosing loop (a word that CEL reserves, and programs may use). A
template is a JSON value in which a string that is `${...}` as a whole stands for the value of that expression, and `${...}` inside a
longer string for its text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from gateway.types import Kind, Lane

MOST_STEPS = 1000  # that one run may execute, unless the program says less
MOST_PARALLEL = 16  # steps of one run at a time

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Expression:
    """CEL source."""

    text: str


@dataclass(frozen=True, slots=True)
class Template:
    """A JSON value with `${expressions}` in its strings."""

    value: Json


@dataclass(frozen=True, slots=True)
class Retry:
    """attempts in all, the first one included. Waits between them grow by `factor` from first_s to most_s, with jitter."""

    attempts: int = 1
    first_s: float = 0.1
    most_s: float = 5.0
    factor: float = 2.0


@dataclass(frozen=True, slots=True)
class Call:
    """One step for a target. fallback: its output when it fails for good; None for none."""

    id: str
    kind: Kind
    target: str
    input: Template
    lane: Lane | None = None
    timeout_s: float | None = None
    retry: Retry = Retry()
    fallback: Template | None = None


@dataclass(frozen=True, slots=True)
class Parallel:
    """Branches at the same time; the first failure cancels the others."""

    id: str
    branches: Mapping[str, "Block"]


@dataclass(frozen=True, slots=True)
class Map:
    """The body for each item of a list, `at_once` of them at a time; at most `most` items."""

    id: str
    over: Expression
    item: str
    body: "Block"
    at_once: int = MOST_PARALLEL
    most: int = 100


@dataclass(frozen=True, slots=True)
class Choose:
    id: str
    condition: Expression
    then: "Block"
    otherwise: "Block" = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """The body while the condition holds. A run whose loop would begin iteration `maximum` + 1 fails, unless `stop_quietly`."""

    id: str
    condition: Expression
    maximum: int
    body: "Block"
    stop_quietly: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """Of an agent loop; what is used up first ends it."""

    iterations: int = 10
    cost: float = float("inf")  # cost units of all steps of the loop
    tokens: int = 1_000_000
    wall_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Tool:
    """What an agent may call: a target, and what the model is told of it."""

    kind: Kind
    target: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Agent:
    """A loop in which a model chooses tool calls until it answers."""

    id: str
    model: str
    messages: Template
    tools: Mapping[str, Tool]  # by the name that the model uses
    budget: Budget = Budget()


Node = Call | Parallel | Map | Choose | Loop | Agent
Block = tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """output None: the last output of its steps. regions it must not leave; empty: any."""

    name: str
    steps: Block
    output: Template | None = None
    input_schema: Mapping[str, object] | None = None
    most_steps: int = MOST_STEPS
    at_once: int = MOST_PARALLEL
    regions: tuple[str, ...] = ()
    description: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

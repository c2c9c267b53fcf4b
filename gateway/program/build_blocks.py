"""What the methods of the builder that open a block give: for `with`, and for references to it."""

from types import TracebackType
from typing import Any, Self

from gateway.program.refs import Ref

Steps = list[dict[str, Any]]
LOOP = "loop:"  # before the id of a loop, in the roots of what is taken from it


def output_of(id: str) -> Ref:
    return Ref("steps", roots=frozenset({"steps"}))[id].output


class Block:
    """Steps that are recorded inside of its `with` are its own."""

    def __init__(self, open_blocks: "list[Block]", id: str, steps: Steps) -> None:
        self.id, self.steps, self._open_blocks = id, steps, open_blocks

    @property
    def output(self) -> Ref:
        """What the steps after it see of it."""
        return output_of(self.id)

    def __enter__(self) -> Self:
        self._open_blocks.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open_blocks.pop()


class If(Block):
    def __init__(self, open_blocks: list[Block], id: str, steps: Steps, otherwise: Steps) -> None:
        super().__init__(open_blocks, id, steps)
        self._otherwise = otherwise

    def otherwise(self) -> Block:
        """For `with`, after the one of the condition."""
        return Block(self._open_blocks, self.id, self._otherwise)


class Branches(Block):
    def __init__(self, open_blocks: list[Block], id: str, branches: dict[str, Steps]) -> None:
        super().__init__(open_blocks, id, [])
        self._branches = branches

    def branch(self, name: str) -> Block:
        """For `with`. `output.<name>` is its last output."""
        if name in self._branches:
            raise ValueError(f"`{self.id}` has two branches `{name}`")
        return Block(self._open_blocks, self.id, self._branches.setdefault(name, []))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        if self.steps and error is None:
            raise ValueError(f"`{self.steps[0]['id']}` is in `{self.id}` but in none of its branches: put it into `with ....branch(name):`")


class Each(Block):
    def __init__(self, open_blocks: list[Block], id: str, steps: Steps, item: str) -> None:
        super().__init__(open_blocks, id, steps)
        self.item = Ref(item, roots=frozenset({item}))


class Repeat(Block):
    @property
    def index(self) -> Ref:
        """Of this iteration, from 0."""
        return Ref("loop.index", roots=frozenset({LOOP + self.id}))

    @property
    def last(self) -> Ref:
        """The last output of the iteration before, null in the first."""
        return Ref("loop.last", roots=frozenset({LOOP + self.id}))

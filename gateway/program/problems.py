"""What can go wrong with a program: mistakes of its text, all at once, and the failure of one of its runs."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class ProgramInvalid(Exception):
    """A program that cannot be used. problems: (path, sentence) for every mistake found, with a path such as
    `steps[2].map.steps[0].input.question`; an empty path is the whole program."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        mistakes = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        lines = (f"  - {path}: {text}" if path else f"  - {text}" for path, text in self.problems)
        super().__init__("\n".join([f"the program has {mistakes}", *lines]))


class RunFailed(Exception):
    """A run that cannot go on. step_id: the node at which it failed, empty for the run as a whole; reason: UPPER_SNAKE_CASE."""

    def __init__(self, step_id: str, message: str, reason: str) -> None:
        super().__init__(f"{step_id}: {message}" if step_id else message)
        self.step_id = step_id
        self.message = message
        self.reason = reason


def nearest(name: str, names: Iterable[str]) -> str:
    """` did you mean ...?` for a name that is close to one of those, else nothing."""
    near = get_close_matches(name, sorted(names), 1)
    return f": did you mean `{near[0]}`?" if near else ""

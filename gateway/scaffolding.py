"""What `nearloop plugins new` writes: an installable package with a policy that does something small, its README and its test."""

import re
from importlib import resources
from pathlib import Path

from gateway.loader import NOT_ASKED
from gateway.policy import Slot

ONE_LINES = {
    Slot.CLASSIFY: "large inputs cost more",
    Slot.ADMISSION: "steps of a tenant at once",
    Slot.LIMIT: "a limit that grows with success and halves with a drop",
    Slot.FAIRNESS: "tenants take turns",
    Slot.ORDERING: "the cheapest step first, with patience",
    Slot.BACKPRESSURE: "so many may wait, so long",
    Slot.CREDITS: "an even share for each session",
    Slot.ROUTING: "where slots are free",
    Slot.BATCHING: "half a batch, or a short wait",
    Slot.HEAD_SAMPLING: "every trace of watched tenants",
    Slot.OBSERVER: "counts the reasons of refusals",
}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class CannotWrite(Exception):
    """A sentence for a person."""


def write_package(name: str, slot: Slot, directory: Path) -> list[Path]:
    """The files, in a new folder of `directory`. Raises CannotWrite, and OSError; nothing that exists is changed."""
    if not _NAME.fullmatch(name):
        raise CannotWrite(f"{name!r} is no name for a policy: lower-case letters, digits and '_', a letter first, 40 at most")
    if slot in NOT_ASKED:
        raise CannotWrite(f"nothing asks policies of the slot {slot} in this version")
    folder = directory / package_of(name)
    if folder.exists():
        raise CannotWrite(f"{folder} exists already: choose another name or directory")
    module = module_of(name)
    test_imports, own_test = _template(f"{slot}_test.py").split("\n\n\n", 1)
    files = {
        "pyproject.toml": _template("pyproject.toml"),
        "README.md": _template("README.md"),
        f"{module}.py": _template(f"{slot}.py"),
        f"test_{module}.py": _template("test.py").replace("test_imports", test_imports) + own_test,
    }
    words = {
        "policy_name": name,
        "policy_module": module,
        "package-name": package_of(name),
        "PolicyName": "".join(part.capitalize() for part in name.split("_")),
        "slot_name": slot.value,
        "one_line": ONE_LINES[slot],
    }
    any_word = re.compile("|".join(words))
    folder.mkdir(parents=True)
    for file_name, text in files.items():
        (folder / file_name).write_text(any_word.sub(lambda found: words[found.group()], text))
    return [folder / file_name for file_name in files]


def package_of(name: str) -> str:
    return "nearloop-" + name.replace("_", "-").strip("-")


def module_of(name: str) -> str:
    return f"nearloop_{name}"


def _template(name: str) -> str:
    return (resources.files("gateway") / "scaffold" / f"{name}.txt").read_text()

"""Are the parts of plugins/README.md that repeat the code up to date? With --write they are made so."""

import inspect
import re
import sys
import textwrap
from pathlib import Path

from gateway import config, hookspec, loader, plugin_facts
from gateway.conformance import RULES
from gateway.policy import Slot

GUIDE = Path(__file__).resolve().parent.parent / "plugins/README.md"
HOOKS = [name for name, value in vars(hookspec).items() if name.startswith("nearloop_") and inspect.isfunction(value)]


def slots() -> str:
    parts = []
    for slot in Slot:
        question = inspect.getdoc(loader.PROTOCOLS[slot]) or ""
        asked = " Refused at start: nothing asks it in this version." if slot in loader.NOT_ASKED else ""
        methods = "\n".join(plugin_facts.methods(slot))
        parts.append(f"### {slot.value}\n\n{_flat(question)}{asked}\n\n```py\n{methods}\n```\n")
    return "\n".join(parts)


def hooks() -> str:
    parts = []
    for name in HOOKS:
        function = getattr(hookspec, name)
        text = _flat((inspect.getdoc(function) or "").split(".. versionadded", 1)[0])
        parts.append(f"### {name}\n\n```py\n{plugin_facts.signature(function)}\n```\n\n{text}\n")
    return "\n".join(parts)


def rules() -> str:
    return "".join(_flat(f"- `{name}`: {inspect.getdoc(rule)}", "  ") + "\n" for name, rule in RULES.items())


def built_in() -> str:
    found = loader.brought(loader.find_plugins(config.parse({})))
    rows = sorted((list(Slot).index(one.slot), one.name, one) for plugin, one in found if plugin in loader.BUILT_IN)
    lines = [f"| {one.slot} | [`{name}`]({one.build.__module__.rpartition('.')[2]}.py) | {one.summary} |" for _, name, one in rows]
    return "\n".join(["| slot | policy | what it does |", "|---|---|---|", *lines]) + "\n"


SECTIONS = {"slots": slots, "hooks": hooks, "rules": rules, "built-in": built_in}


def written(text: str) -> str:
    """The guide with all sections as they should be."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- from the code: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, make=make: f"{match.group(1)}\n{make()}\n{match.group(2)}", text)  # type: ignore[misc]
        if found != 1:
            raise SystemExit(f"{GUIDE.name} must have one section {name!r}, and has {found}")
    return text


def _flat(text: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), 140, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main() -> int:
    text = GUIDE.read_text()
    if "--write" in sys.argv:
        GUIDE.write_text(written(text))
        return 0
    if written(text) != text:
        sys.stderr.write(f"{GUIDE.name} is not what the code says: run python -P tests/check_guide.py --write\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

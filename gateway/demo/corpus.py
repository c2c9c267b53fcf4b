"""The demo's corpus: what the running interpreter's standard library says about itself. Nothing is downloaded."""

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SUMMARY_CHARS = 200
DOC_CHARS = 4000

# Importing these opens windows or browsers, prints, touches the terminal, warns of removal, or brings tests and tables.
_SKIPPED = frozenset(
    "antigravity asynchat asyncore crypt distutils encodings ensurepip idlelib imp lib2to3 msilib pydoc_data readline "
    "rlcompleter smtpd test this tkinter turtle turtledemo winreg winsound".split()
)
# Implementations of modules that have a public name: their contents appear under that name.
_IMPLEMENTATIONS = frozenset("posix nt posixpath ntpath genericpath nturl2path sre_compile sre_constants sre_parse".split())


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented name, for example `shutil.copytree`. Built-in names stand alone: `sorted`, `str.split`."""

    name: str
    kind: str  # module, class, function or method
    module: str
    signature: str  # "(src, dst)"; empty when the interpreter does not know it
    summary: str  # the first paragraph of `doc`, at most SUMMARY_CHARS
    doc: str  # at most DOC_CHARS

    @property
    def text(self) -> str:
        """What is embedded of this entry."""
        return f"{self.name}: {self.summary}"


def build() -> list[Entry]:
    """Every documented public name, sorted by name, each object once and under its shortest name."""
    found: dict[int, tuple[tuple[int, int, str], Entry, object]] = {}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for name, module in _modules():
            for entry, value in _entries(name, module):
                rank = (entry.name.count("."), len(entry.name), entry.name)
                # The value is kept too: its id stays its own as long as it lives.
                if id(value) not in found or rank < found[id(value)][0]:
                    found[id(value)] = (rank, entry, value)
    return sorted({entry.name: entry for _, entry, _ in found.values()}.values(), key=lambda entry: entry.name)


def _modules() -> Iterator[tuple[str, ModuleType]]:
    yield from _import("os.path")
    for name in sorted(sys.stdlib_module_names - _SKIPPED - _IMPLEMENTATIONS):
        if not name.startswith("_"):
            yield from _import(name)


def _import(name: str) -> Iterator[tuple[str, ModuleType]]:
    try:
        module = importlib.import_module(name)
    except Exception:  # not built here, or of another platform
        return
    yield name, module
    for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not child.name.startswith("_") and child.name not in ("test", "tests", "macholib"):
            yield from _import(f"{name}.{child.name}")


def _entries(name: str, module: ModuleType) -> Iterator[tuple[Entry, object]]:
    if entry := _entry(name, "module", name, module):
        yield entry, module
    prefix = "" if name == "builtins" else f"{name}."
    listed = getattr(module, "__all__", None)
    for key in sorted(listed if listed is not None else vars(module)):
        value = getattr(module, key, None)
        if key.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if listed is None and not _belongs(value, name):
            continue
        kind = "class" if inspect.isclass(value) else "function"
        if entry := _entry(prefix + key, kind, name, value):
            yield entry, value
        if inspect.isclass(value) and not issubclass(value, BaseException):
            yield from _methods(prefix + key, name, value)


def _belongs(value: Any, module: str) -> bool:
    """Whether a name without an `__all__` to list it is the module's own, and no import from elsewhere."""
    home = getattr(value, "__module__", None) or module
    top = home.partition(".")[0]
    return top == module.partition(".")[0] or top.startswith("_") or top in _IMPLEMENTATIONS


def _methods(class_name: str, module: str, owner: type) -> Iterator[tuple[Entry, object]]:
    for key, raw in sorted(vars(owner).items()):
        value = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
        if key.startswith("_") or not (inspect.isroutine(value) or isinstance(value, property)):
            continue
        if entry := _entry(f"{class_name}.{key}", "method", module, value):
            yield entry, value


def _entry(name: str, kind: str, module: str, value: Any) -> Entry | None:
    try:
        doc = value.__doc__
        if not doc and inspect.isclass(value) and inspect.isfunction(vars(value).get("__init__")):
            doc = value.__init__.__doc__
        doc = inspect.cleandoc(doc or "")
    except Exception:  # a __doc__ that is no string
        return None
    signature, doc = _signature(name, value, doc)
    summary = " ".join(doc.split("\n\n")[0].split())
    if not summary:
        return None
    return Entry(name, kind, module, signature, summary[:SUMMARY_CHARS], doc[:DOC_CHARS])


def _signature(name: str, value: Any, doc: str) -> tuple[str, str]:
    """The signature, from introspection or else from docstrings that begin with it, and the docstring without it."""
    leaf = name.rpartition(".")[2]
    told = ""
    pattern = re.compile(rf"(?:\w+\.)*{re.escape(leaf)}(\([^\n]*\))(?:\s*-+>\s*([^\n]*))?[ ]*(?:\n+|--|:|$)")
    while match := pattern.match(doc):
        told = told or match.group(1)
        doc = doc[match.end() :].strip(" \n-") or match.group(2) or ""
    if isinstance(value, (ModuleType, property)):
        return "", doc
    try:
        signature = str(inspect.signature(value))
    except Exception:  # introspection evaluates defaults, which may need what is not there
        signature = told
    return re.sub(r" at 0x[0-9a-f]+", "", signature), doc

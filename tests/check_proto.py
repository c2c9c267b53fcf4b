"""Checks that the generated code of proto/ is fresh and that the .proto files keep the project's rules.

Usage: python -P tests/check_proto.py [--write]
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent.parent / "proto"
SOURCES = sorted(PROTO.rglob("*.proto"))
DECLARATION = re.compile(r"^\s*(message|enum|service|rpc|repeated|[\w.]+\s+\w+\s*=\s*\d+|[A-Z][A-Z0-9_]*\s*=\s*\d+)")


def generate(folder: Path) -> None:
    well_known = str(Path(grpc_tools.__file__).parent / "_proto")
    arguments = [
        "protoc",
        f"-I{PROTO}",
        f"-I{well_known}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
        f"--mypy_out=quiet:{folder}",
        f"--mypy_grpc_out=quiet:{folder}",
        *map(str, SOURCES),
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed: see above")


def undocumented(source: Path) -> list[str]:
    """Every declaration in a .proto file has a comment on the line before it."""
    lines = source.read_text().splitlines()
    return [
        f"{source.name}:{number + 1}: no comment before {line.strip()!r}"
        for number, line in enumerate(lines)
        if DECLARATION.match(line) and not lines[number - 1].strip().startswith("//")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the generated code instead of comparing it")
    options = parser.parse_args()
    problems = [problem for source in SOURCES for problem in undocumented(source)]
    if options.write:
        generate(PROTO)
    else:
        with tempfile.TemporaryDirectory() as name:
            generate(Path(name))
            for fresh in sorted(Path(name).rglob("*.py*")):
                committed = PROTO / fresh.relative_to(name)
                if not committed.exists() or committed.read_bytes() != fresh.read_bytes():
                    problems.append(f"{committed.relative_to(PROTO.parent)} is stale: run make proto")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()

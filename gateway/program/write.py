"""Programs to texts that `load_text` reads as the same programs."""

import json
import re
from typing import Any

import yaml

from gateway.program.dump import dump_program
from gateway.program.model import Program


def to_json(program: Program) -> str:
    return json.dumps(dump_program(program), indent=2, ensure_ascii=False) + "\n"


def to_yaml(program: Program) -> str:
    return yaml.dump(dump_program(program), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """What a program uses twice is written twice: texts of programs have no aliases."""
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    """Texts of several lines as blocks, where YAML can."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
# What YAML 1.2 takes for numbers and 1.1, by which PyYAML writes, does not: such texts need quotes.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"(?:0o[0-7]+|[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)$"), list("-+.0123456789")
)

"""The URL template and the headers of an HTTP tool. Pure."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from yarl import URL

from gateway.errors import InvalidStep

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STATIC = "%!$&'()*+,;=:@~/?"  # what an author may write in path and query; all else is encoded
_FIELD = re.compile(r"\{([^{}]*)\}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def scalar_text(value: object) -> str:
    """A JSON scalar as it stands in a URL."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


class UrlTemplate:
    """A URL with `{name}` in its path. Every value stays within its segment, whatever it holds: `a/../b` becomes `a%2F..%2Fb`."""

    def __init__(self, template: str, where: str, problems: list[str]) -> None:
        head, slash, rest = template.partition("://")
        authority, divider, tail = rest.partition("/")
        path, question, query = (divider + tail).partition("?")
        if "{" in authority or "{" in query or "#" in tail or "@" in authority:
            problems.append(f"{where}: url: {{name}} belongs in the path, and there can be no fragment or password")
        names = _FIELD.findall(path)
        problems += [f"{where}: url: {{{name}}} is not a field's name" for name in names if not _NAME.fullmatch(name)]
        if "{" in _FIELD.sub("", path) or "}" in _FIELD.sub("", path):
            problems.append(f"{where}: url: the braces do not match")
        self._start = ""
        try:
            origin = URL(head + slash + authority)
            if not origin.host:
                problems.append(f"{where}: url: there is no host")
            self._start = str(origin).rstrip("/")
        except ValueError as error:
            problems.append(f"{where}: url: {error}")
        self.names = tuple(dict.fromkeys(names))
        self._segments = quote(path, safe="{}" + _STATIC).split("/")
        self._end = question + quote(query, safe=_STATIC)

    @property
    def server(self) -> URL:
        """Scheme, host and port."""
        return URL(self._start)

    def fill(self, fields: Mapping[str, Any]) -> URL:
        """Raises InvalidStep for a value that is no single, plain segment."""

        def encoded(match: re.Match[str]) -> str:
            value = fields.get(match[1])
            if value is None or isinstance(value, dict | list) or value == "":
                raise InvalidStep([(f"input.{match[1]}", "a text, number or boolean that is not empty is needed")], reason="INVALID_INPUT")
            return quote(scalar_text(value), safe="")

        segments = []
        for segment in self._segments:
            filled = _FIELD.sub(encoded, segment)
            if filled != segment and unquote(filled) in (".", ".."):
                raise InvalidStep([(f"input.{_FIELD.findall(segment)[0]}", "must not be '.' or '..'")], reason="INVALID_INPUT")
            segments.append(filled)
        # encoded=True keeps %2F in a value from being taken for a divider.
        return URL(self._start + "/".join(segments) + self._end, encoded=True)


def resolve_headers(headers: Mapping[str, str], environ: Mapping[str, str], where: str, problems: list[str]) -> dict[str, str]:
    """Headers with `${NAME}` replaced. Every missing variable is appended to problems; values never are."""
    resolved = {}
    for header, text in headers.items():
        missing = sorted({name for name in _VARIABLE.findall(text) if name not in environ})
        problems += [f"{where}: headers.{header}: the environment variable {name} is not set" for name in missing]
        value = _VARIABLE.sub(lambda match: environ.get(match[1], ""), text)
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", header) or not value.isprintable():
            problems.append(f"{where}: headers.{header}: neither name nor value may hold control characters")
        resolved[header] = value
    return resolved

"""Header blocks of NATS messages, as bytes. Pure."""

import re

LINE = "NATS/1.0\r\n"
_UNSAFE = re.compile(r"[\x00-\x1f\x7f%]|^ | $")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPED = re.compile(r"%([0-9A-F]{2})")


def escape(text: str) -> str:
    """Text as a header value: control characters, `%` and outer spaces become `%XX`, all else stays readable."""
    if _UNSAFE.search(text) is None:
        return text
    return _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", text)


def unescape(value: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), value) if "%" in value else value


def plain(text: str) -> str:
    """A value that others read (trace context): control characters are dropped, nothing is escaped."""
    return _CONTROL.sub("", text)


def block(fields: str) -> bytes:
    """`fields` is a run of `Name: value\\r\\n` lines."""
    return f"{LINE}{fields}\r\n".encode("utf-8", "replace")


def parse(raw: bytes) -> dict[str, str]:
    """Names and values; the status line is left out. Values stay escaped."""
    lines = raw.decode("utf-8", "replace").split("\r\n")
    try:
        # What Nearloop and the server write; the last two lines are empty.
        return dict([line.split(": ", 1) for line in lines[1:-2]])
    except ValueError:
        pass
    found = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        if name:
            found[name] = value.strip(" ")
    return found


def status(raw: bytes) -> tuple[int, str]:
    """Code and text of an inline status such as `NATS/1.0 408 Request Timeout`; 0 for an ordinary message."""
    if not raw.startswith(b"NATS/1.0 "):
        return 0, ""
    code, _, text = raw[9 : raw.index(b"\r\n")].decode("utf-8", "replace").partition(" ")
    return (int(code), text) if code.isdigit() else (0, "")

"""Checking a JSON input against its JSON Schema, for executors whose schema is data."""

from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import pydantic_core

from gateway.errors import InvalidStep
from gateway.types import JSON, Payload

_MOST_ERRORS = 8


def need_json(payload: Payload) -> None:
    """Raises InvalidStep when the content type is not JSON."""
    if payload.content_type != JSON:
        raise InvalidStep([("input", f"{JSON} is needed, not {payload.content_type}")])


def fields_of(error: Any) -> InvalidStep:
    """An InvalidStep from a pydantic ValidationError, without the refused values."""
    items = error.errors(include_url=False, include_input=False, include_context=False)[:_MOST_ERRORS]
    return InvalidStep([(".".join(["input", *map(str, item["loc"])]), item["msg"]) for item in items], reason="INVALID_INPUT")


class JsonInput:
    """Parses and validates objects. Raises ValueError for a schema that is none."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        try:
            # Formats are annotations in JSON Schema; the messages leave the refused value out.
            self._validator = jsonschema_rs.validator_for(dict(schema), mask="the value")
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
            raise ValueError(f"input_schema is not a JSON Schema: {error.args[0]}") from None

    def parse(self, payload: Payload) -> dict[str, Any]:
        """The input as an object. Raises InvalidStep with every field at fault (the first 8)."""
        need_json(payload)
        try:
            value = pydantic_core.from_json(payload.data, allow_inf_nan=False)
        except ValueError as error:
            raise InvalidStep([("input", f"is not JSON: {error}")], reason="INVALID_INPUT") from None
        if not self._validator.is_valid(value):
            errors = list(self._validator.iter_errors(value))[:_MOST_ERRORS]
            fields = [(".".join(["input", *map(str, error.instance_path)]), error.message) for error in errors]
            raise InvalidStep(fields, reason="INVALID_INPUT")
        if not isinstance(value, dict):
            raise InvalidStep([("input", "a JSON object is needed")], reason="INVALID_INPUT")
        return value

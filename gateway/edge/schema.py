"""Does an input fit its target? JSON against the target's schema, tensors against the model's signature."""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any, NoReturn

import jsonschema_rs
from google.protobuf.message import DecodeError

from gateway.edge.tensor_checks import MAX_PROBLEMS, MISSING_INPUTS, Problems, check_json_inputs, check_tensors
from gateway.errors import StepFailed
from gateway.types import JSON, TENSORS, Payload, Target
from nearloop.v1 import gateway_pb2 as pb

FIELD = "step.input"
JSON_INPUT = "json"  # a model whose only input is a BYTES tensor of this name takes any JSON value
MAX_TEXT_CHARS = 150  # of a field or a description
# The validator makes all its errors at once, which takes a second for some 200,000: a larger input is told its first one only.
MAX_LISTED_BYTES = 16 * 1024


class InputChecker:
    """Checks inputs; keeps one compiled schema for each target, as long as the target announces the same one."""

    def __init__(self) -> None:
        self._compiled: dict[str, tuple[Mapping[str, object], Any]] = {}

    def problems(self, target: Target, payload: Payload) -> Problems:
        """(field, description) pairs, at most MAX_PROBLEMS; empty when the target can take the input.

        Descriptions name fields and types, never values: they may be logged. Raises StepFailed for a target whose schema is broken.
        """
        content_type = payload.content_type
        if content_type == JSON:
            return self._json(target, payload.data)
        if content_type == TENSORS:
            return _tensors(target, payload.data)
        if target.input_schema is not None:
            return [(FIELD, f"{target.scope} takes {JSON}, not {content_type}")]
        if target.tensor_inputs:
            return [(FIELD, f"{target.scope} takes {JSON} or tensors, not {content_type}")]
        return []

    def _json(self, target: Target, data: bytes) -> Problems:
        try:
            value = parse_json(data)
        except ValueError as error:
            return [(FIELD, str(error))]
        if target.input_schema is not None:
            return self._against_schema(target, target.input_schema, value, len(data) <= MAX_LISTED_BYTES)
        if target.tensor_inputs and not takes_any_json(target):
            return check_json_inputs(target, value, FIELD)
        return []

    def _against_schema(self, target: Target, schema: Mapping[str, object], value: object, all_errors: bool) -> Problems:
        known = self._compiled.get(target.scope)
        if known is None or (known[0] is not schema and known[0] != schema):
            known = self._compiled[target.scope] = (schema, _compile(target, schema))
        validator = known[1]
        try:
            if validator.is_valid(value):
                return []
            if all_errors:
                return [_problem(error) for error in islice(validator.iter_errors(value), MAX_PROBLEMS)]
            validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            return [_problem(error)]
        except ValueError as error:  # nested too deep, or text that is no Unicode
            return [(FIELD, f"cannot be checked: {type(error).__name__}")]
        return []


def takes_any_json(target: Target) -> bool:
    """True for a model in the `json` form: its one input is a BYTES tensor named `json`."""
    inputs = target.tensor_inputs
    return len(inputs) == 1 and inputs[0].name == JSON_INPUT and inputs[0].datatype == "BYTES"


def parse_json(data: bytes) -> object:
    """RFC 8259: UTF-8, no NaN or Infinity. Raises ValueError with a text that quotes nothing of the data."""
    try:
        return _DECODER.decode(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8, at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg.removesuffix(' (unexpected UTF-8 BOM)')}, at character {error.pos}") from None
    except _NoConstant:
        raise
    except ValueError:  # sys.get_int_max_str_digits()
        raise ValueError("is not JSON that can be read: a number has too many digits") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read: nested too deep") from None


class _NoConstant(ValueError):
    """NaN or Infinity."""


def _no_constant(name: str) -> NoReturn:
    raise _NoConstant(f"is not JSON: {name} is not allowed")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # json.loads would build one for each call


def _compile(target: Target, schema: Mapping[str, object]) -> Any:
    try:
        # offline: a schema must not make the gateway fetch things. mask: what is wrong is said without the value.
        return jsonschema_rs.validator_for(dict(schema), mask="this value", offline=True)
    except ValueError:
        raise StepFailed(
            f"the input schema of {target.scope} is broken: its owner must correct it",
            code="FAILED_PRECONDITION",
            reason="TARGET_SCHEMA_BROKEN",
        ) from None


def _problem(error: jsonschema_rs.ValidationError) -> tuple[str, str]:
    """The field, `step.input.items[3].name` as google.rpc.BadRequest wants it, and what is wrong. Both may hold keys of the input."""
    field = FIELD + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
    return _cut(field), _cut(error.message)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[: MAX_TEXT_CHARS - 3]}..."


def _tensors(target: Target, data: bytes) -> Problems:
    if target.input_schema is not None or (not target.tensor_inputs and target.kind.value != "infer"):
        return [(FIELD, f"{target.scope} takes {JSON}, not tensors")]
    try:
        message = pb.Tensors.FromString(data)
    except DecodeError:
        return [(FIELD, "is not a nearloop.v1.Tensors message")]
    if not message.tensors:
        return [(FIELD, MISSING_INPUTS)]
    return check_tensors(target, message, FIELD)

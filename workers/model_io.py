"""JSON in, JSON out for the models of `workers/models`: decoding, field checks and the answer to each request.

Free of Triton: a model hands in its `triton_python_backend_utils`, which exists only inside the server's stub.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Body = dict[str, Any]


class InputError(Exception):
    """The caller's input is wrong; the text names the field."""


def decode(raw: bytes | str) -> Body:
    """One JSON object. Raises InputError when it is something else."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"json: not valid JSON ({error})") from None
    if not isinstance(body, dict):
        raise InputError(f"json: an object is needed, not {type(body).__name__}")
    return body


def need(body: Body, field: str, kind: type) -> Any:
    """`body[field]` of type `kind`. Raises InputError that names the field."""
    if field not in body:
        raise InputError(f"{field}: missing")
    value = body[field]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{field}: {kind.__name__} is needed, not {type(value).__name__}")
    return value


def need_between(body: Body, field: str, low: int, high: int) -> int:
    """`body[field]`, an int from `low` to `high`. Raises InputError that names the field."""
    value: int = need(body, field, int)
    if not low <= value <= high:
        raise InputError(f"{field}: from {low} to {high} is allowed, not {value}")
    return value


def encode(body: Body) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def answer_each(pb_utils: Any, requests: Sequence[Any], function: Callable[[Body], Body]) -> list[Any]:
    """One response a request, in order: `function` of each row of `json`, or an INVALID_ARGUMENT that names the field."""
    return [_answer(pb_utils, request, function) for request in requests]


def _answer(pb_utils: Any, request: Any, function: Callable[[Body], Body]) -> Any:
    rows = pb_utils.get_input_tensor_by_name(request, "json").as_numpy()
    try:
        done = [encode(function(decode(raw))) for raw in rows.reshape(-1)]
    except InputError as error:
        return refuse(pb_utils, error)
    return respond(pb_utils, np.array(done, dtype=np.object_).reshape(rows.shape))


def respond(pb_utils: Any, rows: np.ndarray[Any, Any]) -> Any:
    """A response with the output `json`."""
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("json", rows)])


def refuse(pb_utils: Any, error: InputError) -> Any:
    """A response that says what is wrong with the input."""
    fault = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    return pb_utils.InferenceResponse(output_tensors=[], error=fault)

"""A step's input as Triton's ModelInferRequest, and Triton's response as the step's output. Pure.

Three forms of input; the output has the form of the input:

- JSON for a model whose one input is a BYTES tensor `json`: the body goes in as it is, the output `json` comes back as it is;
- JSON in the form of KServe v2, `{"inputs": [{"name", "shape", "datatype", "data"}]}` -> `{"model_name", "outputs": [...]}`;
- a serialised nearloop.v1.Tensors, whose contents are handed through without a copy into other types.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from gateway.errors import InvalidStep, StepFailed
from gateway.tensors import NUMPY_TYPES, from_tensor, pack_bytes, unpack_bytes
from gateway.types import JSON, TENSORS, Payload, TensorSpec
from nearloop.v1 import gateway_pb2 as pb

JSON_TENSOR = "json"


class Form(Enum):
    """What an input is, and so what its output becomes."""

    BODY = auto()
    KSERVE = auto()
    TENSORS = auto()


@dataclass(frozen=True, slots=True)
class Model:
    """What the codec needs to know of a model."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    decoupled: bool = False

    @property
    def takes_body(self) -> bool:
        return len(self.inputs) == 1 and (self.inputs[0].name, self.inputs[0].datatype) == (JSON_TENSOR, "BYTES")


def encode(model: Model, payload: Payload, request_id: str) -> tuple[Any, Form]:
    """(ModelInferRequest, form). Raises InvalidStep for an input that is none of the three forms."""
    request = service_pb2.ModelInferRequest(model_name=model.name, id=request_id)
    if payload.content_type == TENSORS:
        _add_tensors(request, payload.data)
        return request, Form.TENSORS
    if payload.content_type.partition(";")[0].strip().lower() != JSON:
        raise InvalidStep([("input", f"model {model.name} takes {JSON} or {TENSORS}, not {payload.content_type}")])
    if model.takes_body:
        _add(request, JSON_TENSOR, "BYTES", [1] * len(model.inputs[0].shape), pack_bytes([payload.data]))
        return request, Form.BODY
    _add_kserve(request, payload.data)
    return request, Form.KSERVE


def decode(response: Any, form: Form) -> Payload:
    """The output of a ModelInferResponse. Raises StepFailed when it has none in this form."""
    if len(response.raw_output_contents) != len(response.outputs):
        raise StepFailed(f"model {response.model_name} answered without raw tensors", reason="MODEL_OUTPUT_INVALID")
    if form is Form.TENSORS:
        tensors = [
            pb.Tensor(name=output.name, datatype=output.datatype, shape=output.shape, contents=raw)
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        ]
        return Payload(pb.Tensors(tensors=tensors).SerializeToString(), TENSORS)
    if form is Form.BODY:
        return Payload(_body(response), JSON)
    return Payload(_kserve(response), JSON)


def join(tokens: Iterable[Payload], form: Form) -> Payload:
    """The output of a decoupled model: everything that it streamed, in order."""
    if form is Form.TENSORS:
        all_tensors = pb.Tensors()
        for token in tokens:
            all_tensors.MergeFromString(token.data)
        return Payload(all_tensors.SerializeToString(), TENSORS)
    return Payload(b'{"tokens":[' + b",".join(token.data for token in tokens) + b"]}", JSON)


def _add(request: Any, name: str, datatype: str, shape: Iterable[int], contents: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(contents)


def _add_tensors(request: Any, data: bytes) -> None:
    try:
        message = pb.Tensors.FromString(data)
    except DecodeError:
        raise InvalidStep([("input", f"is no serialised nearloop.v1.Tensors, though it says {TENSORS}")]) from None
    for tensor in message.tensors:
        _add(request, tensor.name, tensor.datatype, tensor.shape, tensor.contents)


def _add_kserve(request: Any, data: bytes) -> None:
    try:
        inputs = json.loads(data)["inputs"]
        fields = [(item["name"], item["datatype"], item["shape"], item["data"]) for item in inputs]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = f'model {request.model_name} takes {{"inputs": [{{"name", "shape", "datatype", "data"}}]}}'
        raise InvalidStep([("input", text)]) from None
    for index, (name, datatype, shape, values) in enumerate(fields):
        where = f"input.inputs.{index}"
        if not (isinstance(name, str) and isinstance(datatype, str)):
            raise InvalidStep([(where, "name and datatype must be text")])
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
            raise InvalidStep([(f"{where}.shape", "must be a list of sizes")])
        flat = list(_flatten(values))
        if len(flat) != math.prod(shape):
            raise InvalidStep([(f"{where}.data", f"has {len(flat)} elements, its shape needs {math.prod(shape)}")])
        _add(request, name, datatype, shape, _pack(flat, datatype, where))


def _flatten(values: Any) -> Iterable[Any]:
    if not isinstance(values, list):
        yield values
        return
    for value in values:
        if isinstance(value, list):
            yield from _flatten(value)
        else:
            yield value


def _pack(flat: list[Any], datatype: str, where: str) -> bytes:
    if datatype == "BYTES":
        if not all(isinstance(value, str) for value in flat):
            raise InvalidStep([(f"{where}.data", "BYTES elements are text in JSON")])
        return pack_bytes([value.encode() for value in flat])
    if datatype not in NUMPY_TYPES:
        raise InvalidStep([(f"{where}.datatype", f"{datatype!r} has no form in JSON; one of BYTES, {', '.join(NUMPY_TYPES)} has")])
    dtype = np.dtype(NUMPY_TYPES[datatype])
    if dtype.kind == "b":
        fits = all(type(value) is bool for value in flat)
    elif dtype.kind == "f":
        fits = all(type(value) in (int, float) for value in flat)
    else:
        limits = np.iinfo(dtype)
        fits = all(type(value) is int and limits.min <= value <= limits.max for value in flat)
    if not fits:
        raise InvalidStep([(f"{where}.data", f"has elements that are not {datatype}")])
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=dtype).tobytes()
    except (FloatingPointError, OverflowError):
        raise InvalidStep([(f"{where}.data", f"has elements that {datatype} cannot hold")]) from None


def _body(response: Any) -> bytes:
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == JSON_TENSOR and output.datatype == "BYTES":
            items = unpack_bytes(raw)
            if len(items) == 1:
                return items[0]
    raise StepFailed(f"model {response.model_name} answered without one `{JSON_TENSOR}` element", reason="MODEL_OUTPUT_INVALID")


def _kserve(response: Any) -> bytes:
    outputs = []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        tensor = pb.Tensor(name=output.name, datatype=output.datatype, shape=output.shape, contents=raw)
        try:
            values = from_tensor(tensor).reshape(-1).tolist()
            data = [value.decode() for value in values] if output.datatype == "BYTES" else values
            outputs.append({"name": output.name, "datatype": output.datatype, "shape": list(output.shape), "data": data})
        except ValueError:
            raise _not_json(response.model_name, output.name) from None
    try:
        document = {"model_name": response.model_name, "outputs": outputs}
        return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise _not_json(response.model_name, "with NaN or infinity") from None


def _not_json(model: str, output: str) -> StepFailed:
    return StepFailed(
        f"model {model} has an output {output} that JSON cannot hold; ask with {TENSORS}", code="FAILED_PRECONDITION", reason="NOT_JSON"
    )

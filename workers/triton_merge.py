"""Several steps' ModelInferRequests as one, and its response in parts again. Pure.

Requests can be merged when their inputs are the same in number, order, name, datatype and shape beyond the first dimension, which is the
batch's. A request whose contents do not fit its shapes could shift the rows of the others, so it is never merged.
"""

import math
import struct
from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from gateway.tensors import NUMPY_TYPES

_ITEM_BYTES = {datatype: np.dtype(code).itemsize for datatype, code in NUMPY_TYPES.items()} | {"BF16": 2}
_LENGTH = struct.Struct("<I")


def rows_of(request: Any) -> tuple[Hashable, int]:
    """(key, rows): requests with the same key can be merged. One that can be merged with none has a key of its own."""
    rows = _rows(request)
    if not rows:
        return object(), 1
    return tuple((tensor.name, tensor.datatype, *tensor.shape[1:]) for tensor in request.inputs), rows


def merge(requests: Sequence[Any]) -> Any:
    """Requests with the same key as one, rows in their order. It has the id of the first."""
    first = requests[0]
    merged = service_pb2.ModelInferRequest(model_name=first.model_name, id=first.id)
    for index, tensor in enumerate(first.inputs):
        rows = sum(request.inputs[index].shape[0] for request in requests)
        merged.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=[rows, *tensor.shape[1:]])
        merged.raw_input_contents.append(b"".join(request.raw_input_contents[index] for request in requests))
    return merged


def split(response: Any, rows: Sequence[int]) -> list[Any] | None:
    """A response for each request that was merged, by their rows; None when an output does not have a row for each of the input."""
    if len(response.raw_output_contents) != len(response.outputs):
        return None
    parts = [service_pb2.ModelInferResponse(model_name=response.model_name, model_version=response.model_version) for _ in rows]
    bounds = [0, *accumulate(rows)]
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if not output.shape or output.shape[0] != bounds[-1]:
            return None
        offsets = _offsets(output, raw)
        if offsets is None:
            return None
        rest = output.shape[1:]
        for part, (begin, end) in zip(parts, pairwise(bounds), strict=True):
            part.outputs.add(name=output.name, datatype=output.datatype, shape=[end - begin, *rest])
            part.raw_output_contents.append(raw[offsets[begin] : offsets[end]])
    return parts


def _rows(request: Any) -> int:
    """Size of the batch dimension; 0 when the inputs do not agree about it or do not hold what they say."""
    if not request.inputs or len(request.raw_input_contents) != len(request.inputs):
        return 0
    rows: int = next(iter(request.inputs[0].shape), 0)
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if rows < 1 or not tensor.shape or tensor.shape[0] != rows or _offsets(tensor, raw) is None:
            return 0
    return rows


def _offsets(tensor: Any, raw: bytes) -> Sequence[int] | None:
    """Where each row begins in the contents, and where the last one ends; None when they do not fit the shape."""
    rows, items = tensor.shape[0], math.prod(tensor.shape[1:])
    if items < 0 or rows < 1:
        return None
    if tensor.datatype == "BYTES":
        return _bytes_offsets(raw, rows, items)
    stride = items * _ITEM_BYTES.get(tensor.datatype, -1)
    if stride < 0 or stride * rows != len(raw):
        return None
    return range(0, len(raw) + 1, stride) if stride else [0] * (rows + 1)


def _bytes_offsets(raw: bytes, rows: int, items: int) -> list[int] | None:
    offsets, offset, end = [0], 0, len(raw)
    if items and rows * items * _LENGTH.size > end:
        return None  # before a shape that promises billions is counted to
    for _ in range(rows):
        for _ in range(items):
            if end - offset < _LENGTH.size:
                return None
            offset += _LENGTH.size + _LENGTH.unpack_from(raw, offset)[0]
        offsets.append(offset)
    return offsets if offset == end else None

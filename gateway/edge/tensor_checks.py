"""Do tensors fit a model's signature? Raw ones, and those of the KServe v2 JSON form. Pure."""

import math
import struct
from collections.abc import Mapping, Sequence

from gateway.types import Target, TensorSpec
from nearloop.v1 import gateway_pb2 as pb

Problems = list[tuple[str, str]]

ELEMENT_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}
MISSING_INPUTS = "holds no tensors"
_LENGTH = struct.Struct("<I")


def check_tensors(target: Target, message: pb.Tensors, field: str) -> Problems:
    """(field, description) pairs for raw tensors; a model that announces no inputs gets only the tensors themselves checked."""
    problems: Problems = []
    shapes: dict[str, Sequence[int]] = {}
    for index, tensor in enumerate(message.tensors):
        where = f"{field}.tensors[{index}]"
        problems += _check_one(target, where, tensor.name, tensor.datatype, tensor.shape, shapes)
        if any(size < 0 for size in tensor.shape):
            problems.append((f"{where}.shape", "sizes must not be negative"))
        elif problem := _contents_problem(tensor.datatype, math.prod(tensor.shape), tensor.contents):
            problems.append((f"{where}.contents", problem))
    return problems + _check_all(target, shapes, field)


def check_json_inputs(target: Target, value: object, field: str) -> Problems:
    """(field, description) pairs for `{"inputs": [{"name", "datatype", "shape", "data"}]}`; data may be flat or nested."""
    inputs = value.get("inputs") if isinstance(value, dict) else None
    if not isinstance(inputs, list):
        names = ", ".join(spec.name for spec in target.tensor_inputs)
        return [(f"{field}.inputs", f"{target.scope} takes KServe v2 inputs: a list of tensors ({names})")]
    problems: Problems = []
    shapes: dict[str, Sequence[int]] = {}
    for index, item in enumerate(inputs):
        where = f"{field}.inputs[{index}]"
        if not isinstance(item, dict):
            problems.append((where, "must be an object with name, datatype, shape and data"))
            continue
        name, datatype, shape, data = (item.get(key) for key in ("name", "datatype", "shape", "data"))
        if not isinstance(name, str) or not isinstance(datatype, str):
            problems.append((where, "name and datatype must be texts"))
        elif not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            problems.append((f"{where}.shape", "must be a list of sizes"))
        else:
            problems += _check_one(target, where, name, datatype, shape, shapes)
            if problem := _data_problem(datatype, math.prod(shape), data):
                problems.append((f"{where}.data", problem))
    return problems + _check_all(target, shapes, field)


def _check_one(
    target: Target,
    where: str,
    name: str,
    datatype: str,
    shape: Sequence[int],
    shapes: dict[str, Sequence[int]],
) -> Problems:
    """Name, datatype and shape against the signature; notes the shape in `shapes`."""
    if name in shapes:
        return [(f"{where}.name", f"{name!r} is there twice")]
    shapes[name] = shape
    if datatype != "BYTES" and datatype not in ELEMENT_BYTES:
        return [(f"{where}.datatype", f"{datatype!r} is not a KServe datatype")]
    if not target.tensor_inputs:
        return []
    spec = next((spec for spec in target.tensor_inputs if spec.name == name), None)
    if spec is None:
        known = ", ".join(spec.name for spec in target.tensor_inputs)
        return [(f"{where}.name", f"{target.scope} has no input {name!r}; it has {known}")]
    problems = []
    if datatype != spec.datatype:
        problems.append((f"{where}.datatype", f"must be {spec.datatype}, not {datatype}"))
    if not _fits(spec, shape):
        problems.append((f"{where}.shape", f"must be {list(spec.shape)} (-1 is any size), not {list(shape)}"))
    return problems


def _fits(spec: TensorSpec, shape: Sequence[int]) -> bool:
    if len(spec.shape) != len(shape):
        return False
    return all(want in (-1, size) for want, size in zip(spec.shape, shape, strict=True))


def _check_all(target: Target, shapes: Mapping[str, Sequence[int]], field: str) -> Problems:
    """What only all tensors together show: a missing one, and the batch."""
    problems = [
        (field, f"input {spec.name!r} ({spec.datatype} {list(spec.shape)}) is missing")
        for spec in target.tensor_inputs
        if spec.name not in shapes
    ]
    if target.max_batch_size > 0:
        batches = {shape[0] for shape in shapes.values() if len(shape)}
        if len(batches) > 1:
            problems.append((field, f"all tensors must have the same batch size, not {sorted(batches)}"))
        elif batches and not 1 <= min(batches) <= target.max_batch_size:
            problems.append((field, f"the batch size must be from 1 to {target.max_batch_size}, not {min(batches)}"))
    return problems


def _contents_problem(datatype: str, count: int, contents: bytes) -> str:
    if datatype == "BYTES":
        return _framing_problem(count, contents)
    size = ELEMENT_BYTES.get(datatype)
    if size is None or len(contents) == count * size:
        return ""
    return f"must have {count * size} bytes ({count} elements of {size}), not {len(contents)}"


def _framing_problem(count: int, contents: bytes) -> str:
    """BYTES: each element with its length, four bytes little-endian, before it."""
    offset, found, end = 0, 0, len(contents)
    if end < 4 * count:  # before the walk, so that the walk is bounded by what was sent
        return f"is too short for {count} elements with their lengths"
    while offset < end and found < count:
        if end - offset < 4:
            return "ends within a length"
        offset += 4 + _LENGTH.unpack_from(contents, offset)[0]
        found += 1
    if offset > end:
        return f"ends within element {found - 1}"
    if found < count:
        return f"must have {count} elements, not {found}"
    return "" if offset == end else f"has {end - offset} bytes after its {count} elements"


def _data_problem(datatype: str, count: int, data: object) -> str:
    if not isinstance(data, list):
        return "must be a list"
    flat = _flatten(data)
    if len(flat) != count:
        return f"must have {count} elements, not {len(flat)}"
    if not all(_is_element(datatype, item) for item in flat):
        return f"must hold {datatype} elements only"
    return ""


def _flatten(data: list[object]) -> list[object]:
    """Elements in row-major order; level by level, so that deep nesting costs no stack."""
    while any(isinstance(item, list) for item in data):
        data = [inner for item in data for inner in (item if isinstance(item, list) else [item])]
    return data


def _is_element(datatype: str, item: object) -> bool:
    if datatype == "BYTES":
        return isinstance(item, str)
    if datatype == "BOOL":
        return isinstance(item, bool)
    if isinstance(item, bool):
        return False
    if datatype.startswith(("FP", "BF")):
        return isinstance(item, (int, float))
    if not isinstance(item, int):
        return False
    bits = 8 * ELEMENT_BYTES.get(datatype, 0)
    return 0 <= item < 1 << bits if datatype.startswith("U") else -(1 << bits) <= 2 * item < 1 << bits

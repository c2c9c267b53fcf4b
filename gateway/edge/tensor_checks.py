"""Do tensors fit a model's signature? Raw ones, and those of the KServe v2 JSON form. Pure.

Whatever was sent, the work is linear in its size: a shape is looked at only when it is short, contents only when their shape is right,
and the walk ends with the last problem that is reported. Descriptions are short: they never quote a long text, number or list.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

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
MAX_PROBLEMS = 10
MAX_RANK = 16  # with sizes below 2**63, so a product of them is below 2**1008: cheap, and still a float to be shown
_MAX_SHOWN_CHARS = 60
_MAX_SHOWN_SIZES = 8
_SIZE_LIMIT = 1 << 63  # a size is an int64
_FLOAT_LIMIT = 1 << 1023  # what is below, in size, is a finite float
_LENGTH = struct.Struct("<I")


def check_tensors(target: Target, message: pb.Tensors, field: str) -> Problems:
    """At most MAX_PROBLEMS (field, description) pairs for raw tensors; a model that announces no inputs gets only the tensors
    themselves checked."""
    problems: Problems = []
    shapes: dict[str, Sequence[int]] = {}
    for index, tensor in enumerate(message.tensors):
        where = f"{field}.tensors[{index}]"
        wrong = _check_one(target, where, tensor.name, tensor.datatype, tensor.shape, shapes)
        if not wrong and (problem := _contents_problem(tensor.datatype, math.prod(tensor.shape), tensor.contents)):
            wrong = [(f"{where}.contents", problem)]
        problems += wrong
        if len(problems) >= MAX_PROBLEMS:
            return problems[:MAX_PROBLEMS]
    return (problems + _check_all(target, shapes, field))[:MAX_PROBLEMS]


def check_json_inputs(target: Target, value: object, field: str) -> Problems:
    """At most MAX_PROBLEMS (field, description) pairs for `{"inputs": [{"name", "datatype", "shape", "data"}]}`; data may be flat or
    nested."""
    inputs = value.get("inputs") if isinstance(value, dict) else None
    if not isinstance(inputs, list):
        names = ", ".join(spec.name for spec in target.tensor_inputs)
        return [(f"{field}.inputs", f"{target.scope} takes KServe v2 inputs: a list of tensors ({names})")]
    problems: Problems = []
    shapes: dict[str, Sequence[int]] = {}
    for index, item in enumerate(inputs):
        problems += _check_json_one(target, f"{field}.inputs[{index}]", item, shapes)
        if len(problems) >= MAX_PROBLEMS:
            return problems[:MAX_PROBLEMS]
    return (problems + _check_all(target, shapes, field))[:MAX_PROBLEMS]


def _check_json_one(target: Target, where: str, item: object, shapes: dict[str, Sequence[int]]) -> Problems:
    if not isinstance(item, dict):
        return [(where, "must be an object with name, datatype, shape and data")]
    name, datatype, shape, data = (item.get(key) for key in ("name", "datatype", "shape", "data"))
    if not isinstance(name, str) or not isinstance(datatype, str):
        return [(where, "name and datatype must be texts")]
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        return [(f"{where}.shape", "must be a list of sizes")]
    wrong = _check_one(target, where, name, datatype, shape, shapes)
    if not wrong and (problem := _data_problem(datatype, shape, data)):
        wrong = [(f"{where}.data", problem)]
    return wrong


def _check_one(
    target: Target,
    where: str,
    name: str,
    datatype: str,
    shape: Sequence[int],
    shapes: dict[str, Sequence[int]],
) -> Problems:
    """Name, datatype and shape against the signature; notes in `shapes` a shape that can be one, and nothing for one that cannot."""
    if name in shapes:
        return [(f"{where}.name", f"{_shown(name)} is there twice")]
    shapes[name] = ()
    if datatype != "BYTES" and datatype not in ELEMENT_BYTES:
        return [(f"{where}.datatype", f"{_shown(datatype)} is not a KServe datatype")]
    if problem := _shape_problem(shape):
        return [(f"{where}.shape", problem)]
    shapes[name] = shape
    if not target.tensor_inputs:
        return []
    spec = next((spec for spec in target.tensor_inputs if spec.name == name), None)
    if spec is None:
        known = ", ".join(spec.name for spec in target.tensor_inputs)
        return [(f"{where}.name", f"{target.scope} has no input {_shown(name)}; it has {known}")]
    problems = []
    if datatype != spec.datatype:
        problems.append((f"{where}.datatype", f"must be {spec.datatype}, not {datatype}"))
    if not _fits(spec, shape):
        problems.append((f"{where}.shape", f"must be {_shown_sizes(spec.shape)} (-1 is any size), not {_shown_sizes(shape)}"))
    return problems


def _shape_problem(shape: Sequence[int]) -> str:
    """What no shape may be, whatever the signature."""
    if len(shape) > MAX_RANK:
        return f"has {len(shape)} dimensions; the limit is {MAX_RANK}"
    if any(size < 0 for size in shape):
        return "sizes must not be negative"
    if any(size >= _SIZE_LIMIT for size in shape):
        return "sizes must be below 2**63"
    return ""


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
            problems.append((field, f"all tensors must have the same batch size, not {_shown_sizes(sorted(batches))}"))
        elif batches and not 1 <= min(batches) <= target.max_batch_size:
            problems.append((field, f"the batch size must be from 1 to {target.max_batch_size}, not {_shown_size(min(batches))}"))
    return problems


def _contents_problem(datatype: str, count: int, contents: bytes) -> str:
    if datatype == "BYTES":
        return _framing_problem(count, contents)
    size = ELEMENT_BYTES[datatype]
    if len(contents) == count * size:
        return ""
    return f"must have {_shown_size(count * size)} bytes ({_shown_size(count)} elements of {size}), not {len(contents)}"


def _framing_problem(count: int, contents: bytes) -> str:
    """BYTES: each element with its length, four bytes little-endian, before it."""
    offset, found, end = 0, 0, len(contents)
    if end < 4 * count:  # before the walk, so that the walk is bounded by what was sent
        return f"is too short for {_shown_size(count)} elements with their lengths"
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


def _data_problem(datatype: str, shape: Sequence[int], data: object) -> str:
    if not isinstance(data, list):
        return "must be a list"
    count, depth = math.prod(shape), max(1, len(shape))
    flat = _flatten(data, depth, count)
    if flat is None:
        return f"must be nested no deeper than the shape, {depth} deep"
    if len(flat) > count:
        return f"must have {_shown_size(count)} elements, not more"
    if len(flat) < count:
        return f"must have {_shown_size(count)} elements, not {len(flat)}"
    return "" if _are_elements(datatype, flat) else f"must hold {datatype} elements only"


def _flatten(data: list[object], depth: int, count: int) -> list[object] | None:
    """Elements in row-major order, at most one more than `count`; None when lists are nested deeper than `depth`."""
    flat: list[object] = []
    open_lists = [iter(data)]
    while open_lists:
        for item in open_lists[-1]:
            if isinstance(item, list):
                if len(open_lists) == depth:
                    return None
                open_lists.append(iter(item))
                break
            flat.append(item)
            if len(flat) > count:
                return flat
        else:
            open_lists.pop()
    return flat


def _are_elements(datatype: str, flat: list[object]) -> bool:
    """Types as the JSON decoder makes them: a bool is no number. A range is one comparison with each end, not one for each element."""
    kinds = set(map(type, flat))
    if datatype == "BYTES":
        return kinds <= {str}
    if datatype == "BOOL":
        return kinds <= {bool}
    if datatype.startswith(("FP", "BF")):
        return kinds <= {int, float} and _within(flat, -_FLOAT_LIMIT, _FLOAT_LIMIT)
    bits = 8 * ELEMENT_BYTES[datatype]
    low = 0 if datatype.startswith("U") else -(1 << bits - 1)
    return kinds <= {int} and _within(flat, low, low + (1 << bits))


def _within(flat: list[Any], low: int, end: int) -> bool:
    return not flat or (low <= min(flat) and max(flat) < end)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]!r}..."


def _shown_size(size: int) -> str:
    return str(size) if abs(size) < 10**9 else f"{size:.3g}"


def _shown_sizes(sizes: Sequence[int]) -> str:
    shown = [_shown_size(size) for size in sizes[:_MAX_SHOWN_SIZES]]
    return f"[{', '.join(shown)}{', ...' if len(sizes) > _MAX_SHOWN_SIZES else ''}]"

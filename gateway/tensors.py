"""numpy arrays <-> nearloop.v1.Tensor, the raw tensors of the KServe v2 protocol."""

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.types import TENSORS, Payload
from nearloop.v1 import gateway_pb2 as pb

Array = NDArray[Any]

# Little-endian, as the protocol wants it, whatever the machine.
NUMPY_TYPES: Mapping[str, str] = {
    "BOOL": "|b1",
    "INT8": "|i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "|u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_DATATYPES = {np.dtype(code): name for name, code in NUMPY_TYPES.items()}
_LENGTH = struct.Struct("<I")


def datatype_of(array: Array) -> str:
    """The KServe datatype of an array; strings, bytes and objects are BYTES. Raises ValueError for what has none."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    if array.dtype.name == "bfloat16":  # numpy has none of its own; ml_dtypes brings it
        return "BF16"
    found = _DATATYPES.get(array.dtype.newbyteorder("<"))
    if found is None:
        raise ValueError(f"numpy type {array.dtype} has no KServe datatype")
    return found


def to_tensor(name: str, array: Array) -> pb.Tensor:
    """Any shape; elements are copied, row-major. Raises ValueError for a type that KServe does not have."""
    datatype = datatype_of(array)
    if datatype == "BYTES":
        contents = pack_bytes([_as_bytes(item) for item in array.reshape(-1).tolist()])
    elif datatype == "BF16":
        contents = array.view(np.uint16).astype("<u2").tobytes()
    else:
        contents = array.astype(NUMPY_TYPES[datatype], copy=False).tobytes()
    return pb.Tensor(name=name, datatype=datatype, shape=array.shape, contents=contents)


def from_tensor(tensor: pb.Tensor) -> Array:
    """An array of the tensor's shape, read-only where it shares the contents.

    BYTES become an object array of bytes; BF16, which numpy lacks, becomes float32 without loss.
    Raises ValueError when contents, datatype and shape do not fit together.
    """
    shape = tuple(tensor.shape)
    if tensor.datatype == "BYTES":
        items = unpack_bytes(tensor.contents)
        flat: Array = np.empty(len(items), dtype=np.object_)
        flat[:] = items
        return flat.reshape(shape)
    if tensor.datatype == "BF16":
        wide = np.frombuffer(tensor.contents, "<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(shape)
    if tensor.datatype not in NUMPY_TYPES:
        raise ValueError(f"{tensor.datatype!r} is not a KServe datatype")
    return np.frombuffer(tensor.contents, NUMPY_TYPES[tensor.datatype]).reshape(shape)


def encode(arrays: Mapping[str, Array]) -> Payload:
    """Arrays by tensor name -> a payload. Raises ValueError."""
    message = pb.Tensors(tensors=[to_tensor(name, np.asarray(array)) for name, array in arrays.items()])
    return Payload(message.SerializeToString(), TENSORS)


def decode(payload: Payload) -> dict[str, Array]:
    """The opposite of `encode`. Raises ValueError when the payload holds something else."""
    if payload.content_type != TENSORS:
        raise ValueError(f"the payload holds {payload.content_type}, not tensors")
    return {tensor.name: from_tensor(tensor) for tensor in pb.Tensors.FromString(payload.data).tensors}


def pack_bytes(items: list[bytes]) -> bytes:
    """BYTES elements -> contents: each with its length, four bytes little-endian, before it."""
    return b"".join(part for item in items for part in (_LENGTH.pack(len(item)), item))


def unpack_bytes(contents: bytes) -> list[bytes]:
    """The opposite of `pack_bytes`. Raises ValueError when lengths and contents do not fit."""
    items, offset, end = [], 0, len(contents)
    while offset < end:
        if end - offset < 4:
            raise ValueError("BYTES contents end within a length")
        size = _LENGTH.unpack_from(contents, offset)[0]
        offset += 4
        if size > end - offset:
            raise ValueError("BYTES contents end within an element")
        items.append(contents[offset : offset + size])
        offset += size
    return items


def _as_bytes(item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        return item.encode()
    raise ValueError(f"a BYTES element must be bytes or text, not {type(item).__name__}")

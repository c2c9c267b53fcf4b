"""Texts to vectors through an embedding model: `text` BYTES [n, 1] in, `embedding` FP32 [n, d] out, as raw tensors."""

import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import numpy as np
from google.protobuf.message import DecodeError

from gateway.errors import StepFailed
from gateway.types import TENSORS, Payload
from nearloop.v1 import gateway_pb2 as pb

BATCH = 64  # the model's max_batch_size


class Embed(Protocol):
    """Gives one vector a text, in order. Raises the errors of `gateway.errors`."""

    async def __call__(self, texts: list[str], /) -> list[list[float]]: ...


class TensorEmbedder:
    """Embeds through `execute`, which takes a model's input tensors and gives its output tensors."""

    def __init__(self, execute: Callable[[Payload], Awaitable[Payload]]) -> None:
        self._execute = execute

    async def __call__(self, texts: list[str], /) -> list[list[float]]:
        """One call a batch of 64, one after the other, so that a large upsert does not crowd out queries."""
        vectors: list[list[float]] = []
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            vectors += decode_embeddings(await self._execute(encode_texts(batch)), len(batch))
        return vectors


def encode_texts(texts: Sequence[str]) -> Payload:
    """The tensor `text`, BYTES [n, 1]: each element after its length, four bytes, little-endian."""
    encoded = [text.encode() for text in texts]
    contents = b"".join(struct.pack("<I", len(data)) + data for data in encoded)
    tensor = pb.Tensor(name="text", datatype="BYTES", shape=[len(texts), 1], contents=contents)
    return Payload(pb.Tensors(tensors=[tensor]).SerializeToString(), TENSORS)


def decode_embeddings(payload: Payload, count: int) -> list[list[float]]:
    """`count` vectors from the tensor `embedding`, FP32 [count, d]. Raises StepFailed (EMBEDDING_INVALID) for anything else."""
    try:
        if payload.content_type != TENSORS:
            raise ValueError(f"tensors are needed, not {payload.content_type}")
        tensors = {tensor.name: tensor for tensor in pb.Tensors.FromString(payload.data).tensors}
        tensor = tensors["embedding"]
        if tensor.datatype != "FP32" or len(tensor.shape) != 2 or tensor.shape[0] != count:
            raise ValueError(f"FP32 [{count}, d] is needed, not {tensor.datatype} {list(tensor.shape)}")
        matrix = np.frombuffer(tensor.contents, dtype="<f4").reshape(tuple(tensor.shape))
    except KeyError:
        raise StepFailed("the embedding model gave no tensor 'embedding'", reason="EMBEDDING_INVALID") from None
    except (ValueError, DecodeError) as error:
        raise StepFailed(f"the embedding model's answer: {error}", reason="EMBEDDING_INVALID") from None
    vectors: list[list[float]] = matrix.tolist()
    return vectors

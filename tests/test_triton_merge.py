"""Requests for a model as one, and the response in parts again."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from gateway import tensors
from gateway.types import Payload, TensorSpec
from workers.triton_codec import Form, Model, decode, encode
from workers.triton_merge import merge, rows_of, split

MODEL = Model("m", (TensorSpec("x", "FP32", (-1, 2)),))
BODY = Model("m", (TensorSpec("json", "BYTES", (-1, 1)),))


def request(**arrays: Any) -> Any:
    return encode(MODEL, tensors.encode({name: np.asarray(array) for name, array in arrays.items()}), "s")[0]


def texts(rows: list[list[bytes]]) -> Any:
    array = np.empty((len(rows), len(rows[0])), dtype=np.object_)
    for index, row in enumerate(rows):
        array[index, :] = row
    return array


def echo(merged: Any) -> Any:
    """A model that answers with its inputs."""
    response = service_pb2.ModelInferResponse(model_name=merged.model_name)
    for tensor, raw in zip(merged.inputs, merged.raw_input_contents, strict=True):
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(raw)
    return response


def output(response: Any) -> dict[str, Any]:
    return tensors.decode(decode(response, Form.TENSORS))


BLOCKS = st.lists(
    st.lists(st.tuples(st.integers(-128, 127), st.binary(max_size=9), st.binary(max_size=3)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(BLOCKS)
def test_every_request_gets_its_own_rows_back(blocks: list[list[tuple[int, bytes, bytes]]]) -> None:
    inputs = [
        {
            "n": np.array([[number, number // 2, 7] for number, _, _ in block], dtype=np.int16),
            "t": texts([[one, two] for _, one, two in block]),
            "h": np.array([number % 2 == 0 for number, _, _ in block]),
        }
        for block in blocks
    ]
    requests = [request(**arrays) for arrays in inputs]
    found = [rows_of(one) for one in requests]
    assert {key for key, _ in found} == {found[0][0]}
    assert [rows for _, rows in found] == [len(block) for block in blocks]
    merged = merge(requests)
    assert merged.inputs[0].shape[0] == sum(len(block) for block in blocks)
    assert rows_of(merged)[1] == merged.inputs[0].shape[0]
    parts = split(echo(merged), [rows for _, rows in found])
    assert parts is not None
    for part, arrays in zip(parts, inputs, strict=True):
        answer = output(part)
        assert answer.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(answer[name], array)


def test_forms_share_a_batch_and_each_gets_its_own_form_back() -> None:
    body, form = encode(BODY, Payload(b'{"n": 1}'), "s1")
    raw, raw_form = encode(BODY, tensors.encode({"json": texts([[b'{"n": 2}'], [b"3"]])}), "s2")
    assert rows_of(body)[0] == rows_of(raw)[0]
    parts = split(echo(merge([body, raw])), [1, 2])
    assert parts is not None
    assert json.loads(decode(parts[0], form).data) == {"n": 1}
    assert tensors.decode(decode(parts[1], raw_form))["json"].tolist() == [[b'{"n": 2}'], [b"3"]]


X = np.zeros((1, 2), dtype=np.float32)


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((1, 3), dtype=np.float32)},
        {"x": np.zeros((1, 2, 1), dtype=np.float32)},
        {"x": np.zeros((1, 2), dtype=np.float64)},
        {"y": X},
        {"x": X, "y": X},
    ],
)
def test_other_shapes_types_and_inputs_go_in_another_request(other: dict[str, Any]) -> None:
    assert rows_of(request(**other))[0] != rows_of(request(x=X))[0]
    assert rows_of(request(**other))[0] == rows_of(request(**other))[0]


def raw_request(shape: list[int], datatype: str, contents: bytes, more: bytes | None = None) -> Any:
    made = service_pb2.ModelInferRequest(model_name="m")
    made.inputs.add(name="x", datatype=datatype, shape=shape)
    made.raw_input_contents.append(contents)
    if more is not None:
        made.raw_input_contents.append(more)
    return made


@pytest.mark.parametrize(
    "wrong",
    [
        raw_request([2, 2], "FP32", bytes(12)),  # would shift the rows of others
        raw_request([1, 2], "FP32", bytes(12)),
        raw_request([], "FP32", bytes(4)),
        raw_request([0, 2], "FP32", b""),
        raw_request([-1, 2], "FP32", bytes(8)),
        raw_request([-1, -2], "FP32", bytes(8)),
        raw_request([1, 2], "FP8", bytes(2)),
        raw_request([1, 1], "BYTES", b"\x05\0\0\0abc"),
        raw_request([1, 1], "BYTES", b"\x01\0\0\0a\x01"),
        raw_request([2, 1], "BYTES", b"\x01\0\0\0a"),
        raw_request([2**40, 2**20], "BYTES", b"\x01\0\0\0a"),
        raw_request([1, 1], "FP32", bytes(4), more=bytes(4)),
        request(x=X, y=np.zeros((2, 2), dtype=np.float32)),  # two batch sizes
        service_pb2.ModelInferRequest(model_name="m"),
    ],
)
def test_what_does_not_fit_its_shape_is_merged_with_nothing(wrong: Any) -> None:
    assert rows_of(wrong)[0] != rows_of(wrong)[0]
    assert rows_of(wrong)[1] == 1


def test_rows_without_elements_stay_rows() -> None:
    empty = request(x=np.zeros((2, 0), dtype=np.float32), t=np.empty((2, 0), dtype=np.object_))
    assert rows_of(empty)[1] == 2
    parts = split(echo(merge([empty, empty])), [2, 2])
    assert parts is not None
    assert [output(part)["x"].shape for part in parts] == [(2, 0), (2, 0)]


def test_bfloat16_has_two_bytes() -> None:
    parts = split(echo(merge([raw_request([1, 2], "BF16", b"\x80\x3f\0\x40"), raw_request([1, 2], "BF16", b"\0\0\0\0")])), [1, 1])
    assert parts is not None
    assert output(parts[0])["x"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(("shape", "raw"), [([1, 2], bytes(8)), ([], b""), ([3, 2], bytes(20))])
def test_an_answer_without_a_row_for_each_cannot_be_split(shape: list[int], raw: bytes) -> None:
    response = service_pb2.ModelInferResponse(model_name="m")
    response.outputs.add(name="y", datatype="FP32", shape=shape)
    response.raw_output_contents.append(raw)
    assert split(response, [1, 2]) is None
    response.raw_output_contents.append(b"")
    assert split(response, [1, 2]) is None

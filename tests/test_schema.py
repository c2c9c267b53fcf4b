import struct
from dataclasses import replace
from typing import Any

import pytest
from fake_service import ADDER, DOCS, ECHO

from gateway import tensors
from gateway.edge import tensor_checks
from gateway.edge.convert import dump_json
from gateway.edge.schema import MAX_PROBLEMS, InputChecker
from gateway.errors import StepFailed
from gateway.types import TENSORS, Kind, Payload, Target, TensorSpec
from nearloop.v1 import gateway_pb2 as pb

A = pb.Tensor(name="a", datatype="FP32", shape=[2, 2], contents=b"\0" * 16)
LABEL = pb.Tensor(name="label", datatype="BYTES", shape=[2, 1], contents=tensors.pack_bytes([b"x", b"yy"]))


def problems(target: Target, payload: Payload | bytes) -> list[tuple[str, str]]:
    return InputChecker().problems(target, payload if isinstance(payload, Payload) else Payload(payload))


def raw(*items: pb.Tensor) -> Payload:
    return Payload(pb.Tensors(tensors=items).SerializeToString(), TENSORS)


def changed(tensor: pb.Tensor, **fields: Any) -> pb.Tensor:
    return pb.Tensor(
        name=fields.get("name", tensor.name),
        datatype=fields.get("datatype", tensor.datatype),
        shape=fields.get("shape", tensor.shape),
        contents=fields.get("contents", tensor.contents),
    )


@pytest.mark.parametrize("data", [b"{}", b"[1]", b" 1 ", b'"x"', b"null", '{"ü":"€"}'.encode()])
def test_any_json_goes_to_a_target_without_a_schema(data: bytes) -> None:
    assert problems(ECHO, data) == []


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"{} x", "is not JSON"),
        (b"\xff", "not UTF-8, at byte 0"),
        ('{"a":1}'.encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"NaN", "NaN is not allowed"),
        (b'{"a":[-Infinity]}', "-Infinity is not allowed"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_not_json_is_refused_without_quoting_it(data: bytes, part: str) -> None:
    ((field, text),) = problems(ECHO, data)
    assert field == "step.input"
    assert part in text


def test_the_schema_names_each_field_and_quotes_no_value() -> None:
    assert problems(DOCS, b'{"name":"os.path"}') == []
    found = problems(DOCS, dump_json({"name": 5, "tags": [1, "SECRET"]}))
    assert [field for field, _ in found] == ["step.input.name", "step.input.tags[1]"]
    assert all("SECRET" not in text for _, text in found)
    assert problems(DOCS, b"{}") == [("step.input", '"name" is a required property')]


def test_the_number_of_problems_is_bounded() -> None:
    assert len(problems(DOCS, dump_json({"name": "x", "tags": ["t"] * 1000}))) == MAX_PROBLEMS


def test_a_schema_that_changes_is_compiled_again() -> None:
    checker = InputChecker()
    assert checker.problems(DOCS, Payload(b'{"name":1}'))
    loose = replace(DOCS, input_schema={"type": "object"})
    assert checker.problems(loose, Payload(b'{"name":1}')) == []
    assert checker.problems(DOCS, Payload(b'{"name":1}'))


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "http://127.0.0.1:1/schema"}])
def test_a_broken_schema_is_the_targets_fault(schema: dict[str, object]) -> None:
    with pytest.raises(StepFailed) as caught:
        problems(replace(DOCS, input_schema=schema), b"{}")
    assert caught.value.code == "FAILED_PRECONDITION"


def test_other_content_cannot_go_round_the_schema() -> None:
    assert problems(DOCS, Payload(b"x", "text/plain"))
    assert problems(DOCS, raw(A))
    assert problems(ADDER, Payload(b"x", "text/plain"))
    assert problems(ECHO, raw(A))
    assert problems(ECHO, Payload(b"x", "text/plain")) == []


def test_tensors_that_fit() -> None:
    assert problems(ADDER, raw(A, LABEL)) == []
    assert problems(Target(Kind.INFER, "unknown-signature"), raw(A)) == []


@pytest.mark.parametrize(
    ("items", "field", "part"),
    [
        ([], "step.input", "holds no tensors"),
        ([A], "step.input", "input 'label' (BYTES [-1, 1]) is missing"),
        ([A, LABEL, A], "step.input.tensors[2].name", "twice"),
        ([A, LABEL, changed(A, name="b")], "step.input.tensors[2].name", "no input 'b'; it has a, label"),
        ([changed(A, datatype="INT32"), LABEL], "step.input.tensors[0].datatype", "must be FP32, not INT32"),
        ([changed(A, datatype="FLOAT"), LABEL], "step.input.tensors[0].datatype", "not a KServe datatype"),
        ([changed(A, shape=[4]), LABEL], "step.input.tensors[0].shape", "must be [-1, 2]"),
        ([changed(A, shape=[1, 4]), LABEL], "step.input.tensors[0].shape", "must be [-1, 2]"),
        ([changed(A, shape=[-2, -2]), LABEL], "step.input.tensors[0].shape", "must not be negative"),
        ([changed(A, contents=b"123"), LABEL], "step.input.tensors[0].contents", "must have 16 bytes (4 elements of 4), not 3"),
        ([changed(A, shape=[1, 2], contents=b"\0" * 8), LABEL], "step.input", "same batch size, not [1, 2]"),
        ([changed(A, shape=[2**40, 2**40]), LABEL], "step.input.tensors[0].contents", "must have"),
    ],
)
def test_tensors_that_do_not_fit(items: list[pb.Tensor], field: str, part: str) -> None:
    assert any(name == field and part in text for name, text in problems(ADDER, raw(*items)))


@pytest.mark.parametrize("batch", [0, 5])
def test_the_batch_is_bounded(batch: int) -> None:
    a = changed(A, shape=[batch, 2], contents=b"\0" * 8 * batch)
    label = changed(LABEL, shape=[batch, 1], contents=tensors.pack_bytes([b"x"] * batch))
    assert problems(ADDER, raw(a, label)) == [("step.input", f"the batch size must be from 1 to 4, not {batch}")]


@pytest.mark.parametrize(
    ("contents", "part"),
    [
        (b"", "too short"),
        (b"\0" * 7, "too short"),
        (struct.pack("<I", 9) + b"abcdefgh", "ends within element 0"),
        (struct.pack("<I", 2**32 - 1) + b"abcd", "ends within element 0"),
        (struct.pack("<I", 3) + b"abc" + b"\0\0", "ends within a length"),
        (struct.pack("<I", 4) + b"abcd", "must have 2 elements, not 1"),
        (tensors.pack_bytes([b"x", b"y", b"z"]), "has 5 bytes after its 2 elements"),
    ],
)
def test_bytes_elements_must_be_framed(contents: bytes, part: str) -> None:
    found = problems(ADDER, raw(A, changed(LABEL, contents=contents)))
    assert [name for name, _ in found] == ["step.input.tensors[1].contents"]
    assert part in found[0][1]


def test_tensors_must_be_a_message() -> None:
    assert problems(ADDER, Payload(b"\xff\xff", TENSORS)) == [("step.input", "is not a nearloop.v1.Tensors message")]


def kserve(**fields: Any) -> bytes:
    a = {"name": "a", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2.5], [3, 4]], **fields}
    label = {"name": "label", "datatype": "BYTES", "shape": [2, 1], "data": ["x", "y"]}
    return dump_json({"inputs": [a, label]})


def test_kserve_json_that_fits() -> None:
    assert problems(ADDER, kserve()) == []
    assert problems(ADDER, kserve(data=[1, 2, 3, 4])) == []


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"{}", "step.input.inputs"),
        (b"[]", "step.input.inputs"),
        (b'{"inputs":{}}', "step.input.inputs"),
        (b'{"inputs":[1]}', "step.input.inputs[0]"),
        (kserve(name=1), "step.input.inputs[0]"),
        (kserve(name="b"), "step.input.inputs[0].name"),
        (kserve(datatype="INT8"), "step.input.inputs[0].datatype"),
        (kserve(shape="2"), "step.input.inputs[0].shape"),
        (kserve(shape=[True, 2]), "step.input.inputs[0].shape"),
        (kserve(shape=[4, 1]), "step.input.inputs[0].shape"),
        (kserve(data=[1, 2, 3]), "step.input.inputs[0].data"),
        (kserve(data=[1, 2, 3, "x"]), "step.input.inputs[0].data"),
        (kserve(data=[1, 2, 3, True]), "step.input.inputs[0].data"),
        (kserve(data=None), "step.input.inputs[0].data"),
    ],
)
def test_kserve_json_that_does_not_fit(data: bytes, field: str) -> None:
    assert field in [name for name, _ in problems(ADDER, data)]


@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        ("INT8", [-128, 127], [128, -129, 1.0]),
        ("UINT8", [0, 255], [-1, 256]),
        ("INT64", [-(2**63), 2**63 - 1], [2**63]),
        ("UINT64", [2**64 - 1], [2**64, -1]),
        ("BOOL", [True], [1, "true"]),
        ("BF16", [1, 0.5], ["1"]),
        ("BYTES", [""], [b"".hex, 1]),
    ],
)
def test_elements_of_json_tensors(datatype: str, good: list[object], bad: list[object]) -> None:
    target = Target(Kind.INFER, "m", tensor_inputs=(TensorSpec("x", datatype, (1,)),))
    for item in good + bad:
        value = {"inputs": [{"name": "x", "datatype": datatype, "shape": [1], "data": [item]}]}
        assert bool(tensor_checks.check_json_inputs(target, value, "f")) == any(item is other for other in bad)


def test_a_model_in_the_json_form_takes_any_json() -> None:
    target = Target(Kind.INFER, "plan", tensor_inputs=(TensorSpec("json", "BYTES", (-1, 1)),), max_batch_size=16)
    assert problems(target, b'{"question":"?"}') == []
    assert problems(target, b"{")


def test_sizes_agree_with_numpys() -> None:
    numpy = {name: tensors.np.dtype(code).itemsize for name, code in tensors.NUMPY_TYPES.items()}
    assert {**numpy, "BF16": 2} == dict(tensor_checks.ELEMENT_BYTES)

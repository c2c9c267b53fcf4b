import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_service import ADDER, DOCS, ECHO

from gateway import tensors
from gateway.edge import tensor_checks
from gateway.edge.convert import dump_json
from gateway.edge.schema import MAX_TEXT_CHARS, InputChecker
from gateway.edge.tensor_checks import MAX_PROBLEMS, MAX_RANK, check_json_inputs
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
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"[-" + b"9" * 5000 + b"]", "a number has too many digits"),
    ],
)
def test_what_is_not_json_is_refused_without_quoting_it(data: bytes, part: str) -> None:
    ((field, text),) = problems(ECHO, data)
    assert field == "step.input"
    assert part in text
    assert len(text) <= MAX_TEXT_CHARS


def test_the_schema_names_each_field_and_quotes_no_value() -> None:
    assert problems(DOCS, b'{"name":"os.path"}') == []
    found = problems(DOCS, dump_json({"name": 5, "tags": [1, "SECRET"]}))
    assert [field for field, _ in found] == ["step.input.name", "step.input.tags[1]"]
    assert all("SECRET" not in text for _, text in found)
    assert problems(DOCS, b"{}") == [("step.input", '"name" is a required property')]


def test_the_number_of_problems_is_bounded() -> None:
    assert len(problems(DOCS, dump_json({"name": "x", "tags": ["t"] * 1000}))) == MAX_PROBLEMS


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"additionalProperties": False}, {"k" * 5000: 1}),
        ({"additionalProperties": False}, {f"key{index}": 1 for index in range(5000)}),
        ({"propertyNames": {"pattern": "^a$"}}, {"SECRET" * 500: 1}),
        ({"additionalProperties": {"type": "string"}}, {"k" * 5000: 1}),
        ({"enum": ["x" * 5000]}, "SECRET" * 500),
    ],
)
def test_what_a_schema_says_is_bounded(schema: dict[str, object], value: object) -> None:
    ((field, text),) = problems(replace(DOCS, input_schema=schema), dump_json(value))
    assert field.startswith("step.input")
    assert len(field) <= MAX_TEXT_CHARS
    assert len(text) <= MAX_TEXT_CHARS


def test_a_large_input_is_not_searched_for_more_than_its_first_problem() -> None:
    found = problems(DOCS, dump_json({"name": "x", "tags": ["t"] * 100_000}))
    assert found == [("step.input.tags[0]", 'this value is not of type "integer"')]


@pytest.mark.parametrize("depth", [500, 990])
def test_what_the_schema_cannot_be_held_against_is_refused(depth: int) -> None:
    data = b'{"name":' + b"[" * depth + b"]" * depth + b"}"
    ((field, _),) = problems(DOCS, data)
    assert field.startswith("step.input")


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
        (
            [changed(A, shape=[2**62, 2]), LABEL],
            "step.input.tensors[0].contents",
            "must have 3.69e+19 bytes (9.22e+18 elements of 4), not 16",
        ),
        ([A, changed(LABEL, shape=[2**62, 1])], "step.input.tensors[1].contents", "too short for 4.61e+18 elements"),
        ([A, changed(LABEL, shape=[2**62, 1])], "step.input", "same batch size, not [2, 4.61e+18]"),
        ([changed(A, shape=[-(2**62), 2]), LABEL], "step.input.tensors[0].shape", "must not be negative"),
    ],
)
def test_tensors_that_do_not_fit(items: list[pb.Tensor], field: str, part: str) -> None:
    assert any(name == field and part in text for name, text in problems(ADDER, raw(*items)))


BIG = 2**62
SHORT_CHARS = 300


def kserve_tensor(datatype: str, shape: list[int]) -> object:
    return {"inputs": [{"name": "a", "datatype": datatype, "shape": shape, "data": [1]}]}


@pytest.mark.parametrize("target", [ADDER, Target(Kind.INFER, "unknown-signature")], ids=["signature", "no-signature"])
@pytest.mark.parametrize(
    ("shape", "part"),
    [([BIG] * 110_000, "110000 dimensions"), ([BIG] * (MAX_RANK + 1), "17 dimensions"), ([0] + [BIG] * 400, "401 dimensions")],
)
def test_a_shape_of_too_many_dimensions_is_refused_before_it_is_multiplied(target: Target, shape: list[int], part: str) -> None:
    found = problems(target, raw(changed(A, shape=shape)))
    found += check_json_inputs(target, kserve_tensor("FP32", shape), "step.input")
    wrong = [(field, text) for field, text in found if field.endswith(".shape")]
    assert [field for field, _ in wrong] == ["step.input.tensors[0].shape", "step.input.inputs[0].shape"]
    assert all(part in text and len(text) < SHORT_CHARS for _, text in wrong)
    assert not [field for field, _ in found if field.endswith((".contents", ".data"))]


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_a_shape_beyond_what_is_there_is_refused_in_few_words(datatype: str) -> None:
    target = Target(Kind.INFER, "unknown-signature")
    found = problems(target, raw(changed(A, datatype=datatype, shape=[BIG] * MAX_RANK)))
    found += check_json_inputs(target, kserve_tensor(datatype, [BIG] * MAX_RANK), "step.input")
    assert [field for field, _ in found] == ["step.input.tensors[0].contents", "step.input.inputs[0].data"]
    assert all(len(text) < SHORT_CHARS for _, text in found)


def test_an_empty_tensor_may_have_any_other_size() -> None:
    target = Target(Kind.INFER, "unknown-signature")
    assert problems(target, raw(changed(A, shape=[BIG, BIG, 0], contents=b""))) == []


def test_long_names_and_types_are_not_quoted_whole() -> None:
    long = "n" * 100_000
    for target in (ADDER, Target(Kind.INFER, "unknown-signature")):
        for tensor in (changed(A, name=long, shape=[7]), changed(A, datatype=long), changed(A, name=long)):
            assert all(len(text) < SHORT_CHARS for _, text in problems(target, raw(tensor, tensor)))


@pytest.mark.parametrize("count", [1000, 20_000])
def test_no_more_tensors_are_looked_at_than_problems_are_reported(count: int) -> None:
    assert len(problems(ADDER, raw(*[changed(A, name="b")] * count))) == MAX_PROBLEMS
    assert len(problems(ADDER, dump_json({"inputs": [0] * count}))) == MAX_PROBLEMS


class Touched(dict[str, object]):
    """A JSON object that tells whether it was looked into."""

    touched = False

    def get(self, key: str, default: object = None) -> object:
        self.touched = True
        return super().get(key, default)


def test_the_walk_over_tensors_ends_with_the_last_problem_that_is_reported() -> None:
    inputs = [Touched() for _ in range(MAX_PROBLEMS * 2)]
    check_json_inputs(ADDER, {"inputs": inputs}, "f")
    assert [item.touched for item in inputs] == [True] * MAX_PROBLEMS + [False] * MAX_PROBLEMS


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
        (kserve(shape=[2**63, 2]), "step.input.inputs[0].shape"),
        (kserve(shape=[10**4000, 2]), "step.input.inputs[0].shape"),
        (kserve(shape=[-1, 2]), "step.input.inputs[0].shape"),
        (kserve(data=[1, 2, 3, 10**400]), "step.input.inputs[0].data"),
        (kserve(data=[1, 2, [[3]], 4]), "step.input.inputs[0].data"),
        (kserve(data=[[1, 2], [3, 4], []] * 9), "step.input.inputs[0].data"),
    ],
)
def test_kserve_json_that_does_not_fit(data: bytes, field: str) -> None:
    assert field in [name for name, _ in problems(ADDER, data)]


class Counted(list[object]):
    """A list that counts how many of its elements were asked for."""

    asked = 0

    def __iter__(self) -> Iterator[object]:
        for item in super().__iter__():
            self.asked += 1
            yield item


def test_a_deep_list_is_refused_where_it_gets_too_deep() -> None:
    deep: list[object] = [1]
    for _ in range(900):
        deep = [deep]
    data = Counted([deep, *[0] * 500_000])
    value = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": data}]}
    target = Target(Kind.INFER, "m", tensor_inputs=(TensorSpec("x", "FP32", (-1,)),))
    assert check_json_inputs(target, value, "f") == [("f.inputs[0].data", "must be nested no deeper than the shape, 1 deep")]
    assert data.asked <= 1


def test_no_more_elements_are_gathered_than_the_shape_has() -> None:
    data = Counted([0] * 500_000)
    value = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [3], "data": data}]}
    target = Target(Kind.INFER, "m", tensor_inputs=(TensorSpec("x", "FP32", (-1,)),))
    assert check_json_inputs(target, value, "f") == [("f.inputs[0].data", "must have 3 elements, not more")]
    assert data.asked <= 4


@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [
        ("INT8", [-128, 127], [128, -129, 1.0]),
        ("UINT8", [0, 255], [-1, 256]),
        ("INT64", [-(2**63), 2**63 - 1], [2**63]),
        ("UINT64", [2**64 - 1], [2**64, -1]),
        ("BOOL", [True], [1, "true"]),
        ("BF16", [1, 0.5, -(2**70)], ["1", 10**309, -(10**309), float("inf"), True]),
        ("BYTES", [""], [b"".hex, 1]),
    ],
)
def test_elements_of_json_tensors(datatype: str, good: list[object], bad: list[object]) -> None:
    target = Target(Kind.INFER, "m", tensor_inputs=(TensorSpec("x", datatype, (1,)),))
    for item in good + bad:
        value = {"inputs": [{"name": "x", "datatype": datatype, "shape": [1], "data": [item]}]}
        assert bool(check_json_inputs(target, value, "f")) == any(item is other for other in bad)


def test_a_model_in_the_json_form_takes_any_json() -> None:
    target = Target(Kind.INFER, "plan", tensor_inputs=(TensorSpec("json", "BYTES", (-1, 1)),), max_batch_size=16)
    assert problems(target, b'{"question":"?"}') == []
    assert problems(target, b"{")


def test_sizes_agree_with_numpys() -> None:
    numpy = {name: tensors.np.dtype(code).itemsize for name, code in tensors.NUMPY_TYPES.items()}
    assert {**numpy, "BF16": 2} == dict(tensor_checks.ELEMENT_BYTES)

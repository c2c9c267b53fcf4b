"""The operations on a collection: one definition for their JSON Schema and for their parsing."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from gateway.errors import InvalidStep
from workers.tool_input import fields_of
from workers.vector_store import ID_FIELD

MAX_LIMIT = 100
MAX_POINTS = 1000
FACTS = "x-collection"
_CLOSED = ConfigDict(extra="forbid")
_Text = Annotated[str, Field(min_length=1, description="is embedded; instead of a vector")]
_Vector = Annotated[list[FiniteFloat], Field(min_length=1)]
_Id = Annotated[StrictInt, Field(ge=0, lt=2**63)] | Annotated[StrictStr, Field(min_length=1, max_length=512)]
_SOME = Field(min_length=1, max_length=100)
_Values = Annotated[list[StrictStr], _SOME] | Annotated[list[StrictInt], _SOME]


@with_config(_CLOSED)
class Query(TypedDict):
    """The nearest points, of those whose payload fields equal `filter` (a list: one of its values)."""

    op: Literal["query"]
    text: NotRequired[_Text]
    vector: NotRequired[_Vector]
    limit: NotRequired[Annotated[int, Field(ge=1, le=MAX_LIMIT)]]
    filter: NotRequired[Annotated[dict[str, StrictStr | StrictInt | StrictBool | _Values], Field(max_length=16)]]


@with_config(_CLOSED)
class NewPoint(TypedDict):
    """A point to write; a text id comes back as it was given."""

    id: _Id
    text: NotRequired[_Text]
    vector: NotRequired[_Vector]
    payload: NotRequired[dict[str, Any]]


@with_config(_CLOSED)
class Upsert(TypedDict):
    """Writes points; one with a known id replaces it."""

    op: Literal["upsert"]
    points: Annotated[list[NewPoint], Field(min_length=1, max_length=MAX_POINTS)]


@with_config(_CLOSED)
class Delete(TypedDict):
    """Removes points; an id that is not there is no mistake."""

    op: Literal["delete"]
    ids: Annotated[list[_Id], Field(min_length=1, max_length=MAX_POINTS)]


@with_config(_CLOSED)
class Count(TypedDict):
    """How many points there are."""

    op: Literal["count"]


Operation = Query | Upsert | Delete | Count
_ADAPTER: TypeAdapter[Operation] = TypeAdapter(Annotated[Operation, Field(discriminator="op")])


def input_schema(dimensions: int, **facts: object) -> dict[str, object]:
    """JSON Schema (oneOf) of the operations on a collection whose vectors have `dimensions` numbers.

    facts: what another worker should know of the collection; they are in the schema's FACTS, which means nothing to a validator.
    """
    schema = _ADAPTER.json_schema()
    for name in ("Query", "NewPoint"):
        shape = schema["$defs"][name]
        shape["properties"]["vector"] |= {"minItems": dimensions, "maxItems": dimensions}
        shape["oneOf"] = [{"required": ["text"]}, {"required": ["vector"]}]
    return {"type": "object", **schema, FACTS: {"dimensions": dimensions, **facts}}


def parse(data: bytes, dimensions: int) -> Operation:
    """Raises InvalidStep with the fields at fault."""
    try:
        operation = _ADAPTER.validate_json(data)
    except ValidationError as error:
        raise fields_of(error) from None
    problems: list[tuple[str, str]] = []
    if operation["op"] == "query":
        problems = _located_problems("input", operation, dimensions)
    elif operation["op"] == "upsert":
        for index, point in enumerate(operation["points"]):
            where = f"input.points.{index}"
            problems += _located_problems(where, point, dimensions)
            if ID_FIELD in point.get("payload", {}):
                problems.append((f"{where}.payload", f"{ID_FIELD!r} is reserved"))
    if problems:
        raise InvalidStep(problems[:8], reason="INVALID_INPUT")
    return operation


def _located_problems(where: str, item: Query | NewPoint, dimensions: int) -> list[tuple[str, str]]:
    if ("text" in item) == ("vector" in item):
        return [(where, "exactly one of text and vector is needed")]
    if "vector" in item and len(item["vector"]) != dimensions:
        return [(f"{where}.vector", f"has {len(item['vector'])} numbers, the collection needs {dimensions}")]
    return []

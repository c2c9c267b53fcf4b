"""What is written is what tomllib reads."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import config, toml_writer

values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), values, max_size=6))
def test_round_trip(document: dict[str, Any]) -> None:
    assert tomllib.loads(toml_writer.dumps(document)) == document


def test_a_configuration_survives() -> None:
    document = {
        "gateway": {"listen": "127.0.0.1:0", "max_in_flight": 7},
        "regions": [{"name": "home", "round_trip_ms": {"iad": 80.5}}, {"name": "iad"}],
        "tools": {"http": [{"name": "docs", "url": "http://h/{name}", "headers": {"x-key": "${KEY}"}, "input_schema": {"type": "object"}}]},
        "policies": [{"use": "token_bucket", "rate_per_s": 2.5, "name": "mine"}],
    }
    before = config.parse(document)
    after = config.parse(tomllib.loads(toml_writer.dumps(before.model_dump(mode="json"))))
    assert after == before


def test_null_is_refused() -> None:
    with pytest.raises(TypeError, match="None"):
        toml_writer.dumps({"a": {"b": None}})

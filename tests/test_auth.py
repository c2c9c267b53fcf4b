import pytest
from fake_service import ALICE, BOB, make_config

from gateway.edge.auth import Authenticator
from gateway.errors import Unauthenticated


def authenticator(anonymous: str = "") -> Authenticator:
    return Authenticator(make_config(anonymous).auth)


@pytest.mark.parametrize(
    "metadata",
    [
        [("x-api-key", ALICE)],
        [("authorization", f"Bearer {ALICE}")],
        [("authorization", f"bearer  {ALICE} ")],
        [("user-agent", "x"), ("authorization", f"Bearer {ALICE}"), ("x-api-key", ALICE)],
    ],
)
def test_a_key_names_its_tenant(metadata: list[tuple[str, str | bytes]]) -> None:
    assert authenticator("guest").tenant(metadata) == "alice"


@pytest.mark.parametrize(
    "metadata",
    [
        [("x-api-key", "wrong")],
        [("x-api-key", "")],
        [("x-api-key", b"\xff")],
        [("x-api-key", "\udcff")],
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer ")],
        [("authorization", f"Basic {ALICE}")],
        [("authorization", ALICE)],
        [("x-api-key", f"Bearer {ALICE}")],
        [("authorization", ALICE.encode())],
        [("x-api-key", ALICE), ("x-api-key", "wrong")],
        [("x-api-key", ALICE), ("authorization", f"Bearer {BOB}")],
    ],
)
def test_a_wrong_key_is_never_anonymous(metadata: list[tuple[str, str | bytes]]) -> None:
    asked = authenticator("guest")
    for right in (("x-api-key", ALICE), ("authorization", f"Bearer {ALICE}")):  # what was right before helps nobody
        assert asked.tenant([right]) == "alice"
    with pytest.raises(Unauthenticated) as caught:
        asked.tenant(metadata)
    assert caught.value.reason == "API_KEY_INVALID"
    assert ALICE not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_without_a_key_only_a_configured_anonymous_tenant_may_call() -> None:
    assert authenticator("guest").tenant([]) == "guest"
    with pytest.raises(Unauthenticated) as caught:
        authenticator().tenant([("tenant", "alice")])
    assert caught.value.reason == "API_KEY_MISSING"


def test_only_right_keys_are_remembered_and_not_without_bound() -> None:
    asked = authenticator("guest")
    for spaces in range(1, 1000):
        assert asked.tenant([("authorization", "Bearer" + " " * spaces + ALICE)]) == "alice"
    assert len(asked._remembered) <= 8

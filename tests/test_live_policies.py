"""Policies changed while gateways run: by the NATS CLI on two real gateways, and the rules of it without any."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from nats_cli_support import CLI, CONFIG, HINT, Desk
from stack_support import Broker, eventually, running

from gateway import config
from gateway.client import NearloopClient
from gateway.core.policies import PolicyEntry, PolicySet
from gateway.edge.policy_bucket import LOOK_S
from gateway.errors import Rejected
from gateway.live_policies import LivePolicies
from gateway.policy import OnError, PolicyType, Slot

POLICIES = """
[[policies]]
use = "token_bucket"
name = "quota"
burst = 10000.0
"""


@dataclass(frozen=True)
class HerdConfig:
    """What a herd may be."""

    size: int = 3
    label: str = "sheep"
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("size must be at least 1")


class Herd:
    def __init__(self, herd: HerdConfig) -> None:
        self.config = herd

    def reconfigure(self, herd: HerdConfig) -> None:
        if herd.label == "goat":
            raise RuntimeError("no goats")
        self.config = herd


def live(build: type = Herd) -> tuple[LivePolicies, PolicyEntry, list[str]]:
    changes: list[str] = []
    entry = PolicyEntry("herd", PolicyType("herd", Slot.LIMIT, HerdConfig, build), HerdConfig(size=5), OnError.ADMIT)
    return LivePolicies(PolicySet({Slot.LIMIT: [entry]}), lambda: changes.append("changed")), entry, changes


def test_a_value_reaches_the_objects_that_are_and_those_to_come() -> None:
    policies, entry, changes = live()
    before = [entry.named().policy, entry.named().policy]
    assert policies.change("herd", "size", "7").applied
    assert policies.change("herd", "label", "cow").applied
    assert policies.change("herd", "limits", '{"tool.docs": 2}').applied
    expected = HerdConfig(7, "cow", {"tool.docs": 2})
    assert [policy.config for policy in (*before, entry.named().policy)] == [expected] * 3
    assert changes == ["changed"] * 3


def test_a_value_taken_away_gives_way_to_the_configuration() -> None:
    policies, entry, _ = live()
    policies.change("herd", "size", "7")
    policies.change("herd", "label", "cow")
    assert policies.change("herd", "size", None).applied
    assert entry.config == HerdConfig(5, "cow")


def test_digits_can_be_a_word() -> None:
    policies, entry, _ = live()
    assert policies.change("herd", "label", "12").applied
    assert entry.config.label == "12"


@pytest.mark.parametrize(
    ("policy", "parameter", "value", "sentence"),
    [
        ("hert", "size", "3", "there is no policy 'hert' here; did you mean 'herd'?"),
        ("herd", "sise", "3", "policy herd has no parameter 'sise'; did you mean 'size'?"),
        ("herd", "size", "many", "size: Input should be a valid integer, unable to parse string as an integer"),
        ("herd", "size", "0", "size must be at least 1"),
        ("herd", "label", "goat", "reconfigure() raised RuntimeError: no goats"),
    ],
)
def test_what_is_refused_changes_nothing(policy: str, parameter: str, value: str, sentence: str) -> None:
    policies, entry, changes = live()
    built = entry.named().policy
    assert policies.change(policy, parameter, value) == (False, sentence)
    assert built.config == entry.config == HerdConfig(5)
    assert changes == []


def test_a_policy_that_cannot_be_changed_says_so() -> None:
    class Fixed:
        def __init__(self, herd: HerdConfig) -> None: ...

    policies, _, _ = live(Fixed)
    assert policies.change("herd", "size", "3") == (False, "policy herd cannot be changed while it runs: it has no reconfigure()")


@pytest_asyncio.fixture
async def desk(tmp_path: Path) -> AsyncIterator[tuple[Desk, list[NearloopClient]]]:
    if CLI is None:
        pytest.skip(f"the NATS CLI is not here: {HINT}")
    parsed = config.loads(CONFIG.replace("SHOP", "http://127.0.0.1:1") + POLICIES, "live")
    async with running(parsed, triton=False, gateways=2) as stack, Broker(stack.nats_url) as broker:
        first, second = (NearloopClient(address) for address in stack.gateway_addresses)
        async with first, second:
            yield Desk(stack, first, broker, tmp_path, 1), [first, second]


async def answer(client: NearloopClient) -> str:
    """The reason of the refusal, or nothing."""
    try:
        await client.execute("tool", "echo", {}, timeout_s=10)
    except Rejected as error:
        return error.reason
    return ""


@pytest.mark.stack
async def test_the_nats_cli_changes_a_policy_on_two_gateways(desk: tuple[Desk, list[NearloopClient]]) -> None:
    cli, clients = desk

    async def both() -> list[str]:
        return await asyncio.gather(*(answer(client) for client in clients))

    async def states(key: str) -> list[dict[str, object]]:
        listed = (await cli.nats("kv", "ls", "nl-policy")).split()
        keys = [line for line in listed if line.startswith("status.gateway-") and line.endswith(key)]
        return [json.loads(await cli.nats("kv", "get", "nl-policy", one, "--raw")) for one in keys]

    async def all_tell(key: str, state: str, revision: int) -> list[dict[str, object]]:
        def told(found: list[dict[str, object]]) -> bool:
            return len(found) == 2 and all((one["state"], one["revision"]) == (state, revision) for one in found)

        return await eventually(lambda: states(key), told, 20, f"{key} is {state} on both gateways")

    async def revision(key: str) -> int:
        (found,) = [await cli.broker.api("STREAM.MSG.GET.KV_nl-policy", last_by_subj=f"$KV.nl-policy.{key}")]
        return int(found["message"]["seq"])

    assert LOOK_S <= 1.0, "a change is to take effect within two seconds"
    assert await both() == ["", ""]
    await cli.nats("kv", "put", "nl-policy", "quota.burst", "0.5")
    await eventually(both, lambda reasons: reasons == ["COST_OVER_BURST"] * 2, 20, "the new burst counts on both gateways")
    await all_tell("quota.burst", "applied", await revision("quota.burst"))

    await cli.nats("kv", "put", "nl-policy", "quota.burst", "0")
    refused = await all_tell("quota.burst", "refused", await revision("quota.burst"))
    assert all("positive" in str(one["message"]) for one in refused)
    assert await both() == ["COST_OVER_BURST"] * 2, "the old value stays"
    for name in ("gateway", "gateway-2"):
        logged = (cli.stack.state_dir / "logs" / f"{name}.log").read_text()
        assert "quota.burst, revision" in logged
        assert "is refused, the old value stays" in logged

    await cli.nats("kv", "put", "nl-policy", "qota.burst", "1")
    unknown = await all_tell("qota.burst", "refused", await revision("qota.burst"))
    assert "did you mean 'quota'?" in str(unknown[0]["message"])

    await cli.nats("kv", "del", "nl-policy", "quota.burst", "-f")
    await eventually(both, lambda reasons: reasons == ["", ""], 20, "the configured burst counts again")

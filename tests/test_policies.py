"""The shipped conformance suite over every built-in policy, then what single ones are for."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import config, conformance, loader
from gateway.policy import ADMIT, PolicyType, Reject, ScopeView
from gateway.types import Flow, Kind, Lane
from plugins.parent_ratio import ParentRatio, ParentRatioConfig
from plugins.token_bucket import TokenBucket, TokenBucketConfig

TYPES = list(loader.policy_types(loader.find_plugins(config.parse({}))).values())
FLOW = Flow("acme", "x", Kind.TOOL, Lane.STANDARD, cost=2.0)
VIEW = ScopeView("tool.x", 3, 8, 5, 0.25, 12.0)
KEYS = (2000, 10_000)  # of a bounded state; five times as many with `nearloop plugins check`


def with_small_bounds(policy_type: PolicyType) -> Any:
    """The configuration with what bounds the state lowered, so that a look at some thousand keys finds whether it is kept."""
    made = policy_type.config()
    bounds = {
        field.name: 1000
        for field in dataclasses.fields(made)
        if field.name.startswith("max_") and isinstance(getattr(made, field.name), int) and getattr(made, field.name) >= 2000
    }
    try:
        return dataclasses.replace(made, **bounds)
    except ValueError:  # this one's are bounds of something else
        return made


@pytest.mark.parametrize("rule", conformance.RULES)
@pytest.mark.parametrize("policy_type", TYPES, ids=lambda policy_type: policy_type.name)
def test_conformance(policy_type: PolicyType, rule: str) -> None:
    more: dict[str, Any] = {"config": with_small_bounds(policy_type), "keys": KEYS} if rule == "bounded_state" else {}
    assert conformance.check_rule(rule, policy_type, **more) == []


@pytest.mark.parametrize("policy_type", TYPES, ids=lambda policy_type: policy_type.name)
def test_every_built_in_policy_can_be_changed_while_it_runs(policy_type: PolicyType) -> None:
    assert hasattr(policy_type.build(policy_type.config()), "reconfigure")


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0.1, 5)), max_size=60))
def test_token_bucket_never_admits_more_than_rate_and_burst(arrivals: list[tuple[float, float]]) -> None:
    policy = TokenBucket(TokenBucketConfig(rate_per_s=4, burst=6))
    now_s = admitted = 0.0
    for gap_s, cost in arrivals:
        now_s += gap_s
        flow = dataclasses.replace(FLOW, cost=cost)
        if policy.decide(flow, VIEW, now_s, 0.0) is ADMIT:
            admitted += cost
        assert admitted <= 6 + 4 * now_s + 1e-6


def test_token_bucket_hint_is_when_the_tokens_are_there() -> None:
    policy = TokenBucket(TokenBucketConfig(rate_per_s=2, burst=2))
    assert policy.decide(FLOW, VIEW, 0.0, 0.0) is ADMIT
    refused = policy.decide(FLOW, VIEW, 0.25, 0.0)
    assert isinstance(refused, Reject)
    assert (refused.reason, refused.scope, refused.retry_after_s) == ("RATE_LIMITED", "tenant:acme", pytest.approx(0.75))
    assert policy.decide(FLOW, VIEW, 1.0, 0.0) is ADMIT


def test_token_bucket_is_per_tenant_returns_what_is_released_and_refuses_the_impossible() -> None:
    policy = TokenBucket(TokenBucketConfig(rate_per_s=1, burst=2, tenants={"big": 100.0}))
    assert policy.decide(FLOW, VIEW, 0.0, 0.0) is ADMIT
    assert policy.decide(dataclasses.replace(FLOW, tenant="other"), VIEW, 0.0, 0.0) is ADMIT
    policy.release(FLOW, None, 0.0)
    assert policy.decide(FLOW, VIEW, 0.0, 0.0) is ADMIT
    too_much = policy.decide(dataclasses.replace(FLOW, cost=3.0), VIEW, 0.0, 0.0)
    assert isinstance(too_much, Reject)
    assert (too_much.reason, too_much.retry_after_s) == ("COST_OVER_BURST", None)


@pytest.mark.parametrize(("upstream", "expected"), [(True, 1.0), (False, 0.0), (None, 0.25)])
def test_parent_ratio_follows_the_parent(upstream: bool | None, expected: float) -> None:
    assert ParentRatio(ParentRatioConfig(ratio=0.25)).probability(FLOW, upstream, 0.0) == expected

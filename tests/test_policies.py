"""One conformance suite for every built-in policy, then what each one is for."""

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import config, loader
from gateway.policy import ADMIT, BatchView, Ending, PolicyType, Reject, Sample, ScopeView, Slot
from gateway.types import Endpoint, Flow, Kind, Lane
from plugins.parent_ratio import ParentRatio, ParentRatioConfig
from plugins.token_bucket import TokenBucket, TokenBucketConfig

TYPES = list(loader.policy_types(loader.find_plugins(config.parse({}))).values())
FLOW = Flow("acme", "x", Kind.TOOL, Lane.STANDARD, cost=2.0)
VIEW = ScopeView("tool.x", 3, 8, 5, 0.25, 12.0)
SAMPLE = Sample("tool.x", Ending.SUCCEEDED, 0.1, 0.02, 0.07, 3)
CALLS: dict[Slot, list[tuple[str, tuple[object, ...]]]] = {
    Slot.ADMISSION: [("decide", (FLOW, VIEW, 1.0, 0.5)), ("release", (FLOW, None, 1.5)), ("ended", (FLOW, None, SAMPLE, 2.0))],
    Slot.LIMIT: [("limit", ("tool.x",)), ("on_sample", (SAMPLE, 2.0))],
    Slot.BACKPRESSURE: [("may_wait", (FLOW, VIEW, 1.0)), ("retry_after_s", (FLOW, VIEW, 1.0, 0.5)), ("credits", ("c", VIEW, 1.0))],
    Slot.ROUTING: [("score", (FLOW, Endpoint("a", 2, 8, 1, 0.02, True), 1.0))],
    Slot.BATCHING: [("wait_s", (BatchView(3, 8, 0.01, 0.5, 1, 40.0), 1.0)), ("on_batch", (3, 0.02, 1.0))],
    Slot.HEAD_SAMPLING: [("probability", (FLOW, None, 1.0))],
}


def play(policy: object, slot: Slot) -> list[object]:
    return [getattr(policy, method)(*arguments) for _ in range(3) for method, arguments in CALLS[slot]]


@pytest.mark.parametrize("policy_type", TYPES, ids=lambda policy_type: policy_type.name)
class TestConformance:
    def test_same_calls_same_answers(self, policy_type: PolicyType) -> None:
        answers = [play(policy_type.build(policy_type.config()), policy_type.slot) for _ in range(2)]
        assert pickle.dumps(answers[0]) == pickle.dumps(answers[1])

    def test_does_not_change_its_input(self, policy_type: PolicyType) -> None:
        before = copy.deepcopy(CALLS[policy_type.slot])
        play(policy_type.build(policy_type.config()), policy_type.slot)
        assert before == CALLS[policy_type.slot]

    def test_configuration_is_frozen_with_defaults_and_documented(self, policy_type: PolicyType) -> None:
        made = policy_type.config()
        assert policy_type.config.__doc__
        assert policy_type.summary
        for field in dataclasses.fields(made):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(made, field.name, 1)

    def test_has_every_method_of_its_slot(self, policy_type: PolicyType) -> None:
        policy = policy_type.build(policy_type.config())
        assert [name for name in loader.METHODS[policy_type.slot] if not hasattr(policy, name)] == []


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

"""What a single tenant, client, operator or plugin must not be able to do to the others."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from gateway import Admit, Ending, Flow, Kind, Lane, Reject, Sample, ScopeView, loader
from gateway.config import parse
from gateway.core.containment import a_decision, a_flow_of
from gateway.core.policies import PolicyEntry, PolicySet
from gateway.live_policies import LivePolicies
from gateway.policy import OnError, PolicyType, Slot
from plugins.cinnamon import Cinnamon, CinnamonConfig
from plugins.dagor import Dagor, DagorConfig
from plugins.deadline import Deadline, DeadlineConfig
from plugins.vegas import Vegas, VegasConfig
from tests.lab.engine import Gateway, Server, Simulation, poisson, service_time
from tests.lab.scenario import Stack

FLOW = Flow("acme", "plan", Kind.INFER, Lane.STANDARD)
IDLE = ScopeView("infer.plan", 0, 8, 0, 0.0, 0.0, 2.0, 2.0)
BUSY = ScopeView("infer.plan", 8, 8, 4, 0.2, 40.0, 0.2, 0.1)


def sample(ending: Ending, round_trip_s: float, inflight: int = 8) -> Sample:
    return Sample("infer.plan", ending, round_trip_s, 0.0, round_trip_s, inflight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": float("nan")}, [1.0, float("-inf")]])
def test_a_parameter_that_is_no_number_is_refused(value: Any) -> None:
    token_bucket = loader.policy_types(loader.find_plugins(parse({})))["token_bucket"]
    assert loader.read_parameters(token_bucket, {"burst": value})[1] == ["burst: must be a finite number"]


def test_steps_that_were_never_sent_or_had_no_patience_do_not_shrink_a_limit() -> None:
    for ending_s in (0.0, 0.11):
        policy = Vegas(VegasConfig(initial=8))
        for number in range(400):
            policy.on_sample(sample(Ending.SUCCEEDED, 0.1), number * 0.01, 0.5)
            policy.on_sample(sample(Ending.DROPPED, ending_s), number * 0.01 + 0.005, 0.5)
        assert policy.limit("infer.plan") >= 4, f"{ending_s} s"


def test_short_deadlines_of_one_tenant_do_not_shut_out_another() -> None:
    simulation = Simulation(1)
    gateway = Gateway(simulation, Server(simulation, 20), Stack().permits(simulation.random.random, lambda: simulation.now_s))
    draw = service_time("exp", 0.1, simulation.random)
    poisson(simulation, lambda now_s: 140.0, lambda: gateway.offer(FLOW, draw()) and None, 30.0)
    hasty = replace(FLOW, tenant="hasty")
    poisson(simulation, lambda now_s: 20.0, lambda: gateway.offer(replace(hasty, deadline_s=simulation.now_s + 0.1), draw()) and None, 30.0)
    simulation.run(32.0)
    patient = [step for step in gateway.records if step.flow.tenant == "acme"]
    assert sum(step.outcome == "ok" for step in patient) / len(patient) > 0.95


def test_a_run_is_favoured_for_a_bounded_number_of_steps() -> None:
    policy, flow = Cinnamon(CinnamonConfig()), replace(FLOW, run="for-ever")
    policy.decide(flow, IDLE, 0.0, 0.5)
    policy.ended(flow, None, sample(Ending.SUCCEEDED, 0.1), 0.1)
    decisions = [policy.decide(flow, IDLE, 0.2, 0.5) for _ in range(100)]
    assert decisions.count(Admit(favoured=True)) == 64


def test_dagor_lets_a_level_with_many_steps_in_again() -> None:
    policy = Dagor(DagorConfig())
    admitted, now_s = 0, 0.0
    for number in range(3000):
        now_s = number / 100
        decision = policy.decide(FLOW, BUSY, now_s, 0.5)
        if not isinstance(decision, Reject):
            admitted += now_s > 5
            wait_s = 0.5 if now_s < 2 else 0.0
            policy.ended(FLOW, decision.state, replace(sample(Ending.SUCCEEDED, 0.1), queue_s=wait_s, worker_wait_s=wait_s), now_s)
    assert admitted > 1000


def test_an_idle_target_is_tried_whatever_was_expected() -> None:
    hasty = replace(FLOW, deadline_s=1.0)
    policy = Deadline(DeadlineConfig())
    assert not isinstance(policy.decide(hasty, IDLE, 0.0, 0.5), Reject)
    assert isinstance(policy.decide(hasty, replace(IDLE, inflight=1), 0.0, 0.5), Reject)


@pytest.mark.parametrize("hint", [float("nan"), float("inf"), -1.0, "soon"])
def test_a_rejection_with_a_hint_that_cannot_be_sent_is_nonsense(hint: Any) -> None:
    with pytest.raises(TypeError):
        a_decision(Reject("NO", "no", retry_after_s=hint))
    with pytest.raises(TypeError):
        a_decision(Reject(None, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"tier": 1.0}, {"run": ["x"]}, {"deadline_s": float("nan")}])
def test_a_classifier_that_answers_nonsense_is_contained(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        a_flow_of(FLOW)(replace(FLOW, **wrong))


def test_a_type_with_text_for_a_slot_or_on_error_is_refused_with_a_sentence() -> None:
    def build(_: object) -> object:
        return object()

    good = PolicyType("x", Slot.ADMISSION, CinnamonConfig, build)
    assert "say Slot.ADMISSION" in loader._wrong_type(replace(good, slot="admission"))
    assert "say OnError.ADMIT" in loader._wrong_type(replace(good, on_error="admit"))
    assert "is not an id" in loader._wrong_type(replace(good, name=5))


def test_a_policy_that_cannot_be_built_with_a_new_value_keeps_the_old_one() -> None:
    def build(config: CinnamonConfig) -> Cinnamon:
        if config.kp > 1:
            raise RuntimeError("too lively")
        return Cinnamon(config)

    entry = PolicyEntry("c", PolicyType("c", Slot.ADMISSION, CinnamonConfig, build), CinnamonConfig(), OnError.ADMIT)
    live = LivePolicies(PolicySet({Slot.ADMISSION: [entry]}))
    assert live.change("c", "kp", "2") == (False, "reconfigure() raised RuntimeError: too lively")
    assert entry.config == CinnamonConfig()


async def test_values_that_are_right_only_together_are_applied_in_any_order() -> None:
    from gateway.edge.policy_bucket import PolicyBucket

    entry = PolicyEntry("v", PolicyType("v", Slot.LIMIT, VegasConfig, Vegas), VegasConfig(), OnError.ADMIT)
    live = LivePolicies(PolicySet({Slot.LIMIT: [entry]}))
    told: list[bytes] = []

    class Js:
        async def publish(self, subject: str, payload: bytes, headers: bytes) -> None:
            told.append(payload)
            await asyncio.sleep(0)

    bucket = PolicyBucket(Js(), "g", live.change)  # type: ignore[arg-type]
    await bucket._take("v.initial", "1500", 1)
    assert entry.config.initial != 1500
    await bucket._take("v.max_limit", "3000", 2)
    assert await bucket._try_again()
    assert (entry.config.initial, entry.config.max_limit) == (1500, 3000)
    assert not bucket._refused
    assert b"refused" in told[0]
    assert b"applied" in told[-1]

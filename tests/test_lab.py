"""The laboratory itself: its formulas against published numbers, its simulation against the formulas, its verdicts."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.errors import ConfigError
from gateway.policy import Ending, Slot
from gateway.types import Flow, Kind, Lane
from tests.lab import __main__ as lab
from tests.lab import a1_overload, engine, oracles, report
from tests.lab.scenario import Measured, Stack

FLOW = Flow("t", "x", Kind.INFER, Lane.STANDARD)


def simulate(seed: int, servers: int, rate_per_s: float, kind: str, steps: int, stack: Stack | None = None) -> engine.Gateway:
    """`steps` Poisson arrivals with a mean service time of a second."""
    simulation = engine.Simulation(seed)
    server = engine.Server(simulation, servers)
    permits = stack.permits(simulation.policy_random.random) if stack else None
    gateway = engine.Gateway(simulation, server, permits)
    draw = engine.service_time(kind, 1.0, simulation.random)
    until_s = steps / rate_per_s
    engine.poisson(simulation, lambda now_s: rate_per_s, lambda: gateway.offer(FLOW, draw()) and None, until_s)
    simulation.run(until_s + 200)
    return gateway


def waits(gateway: engine.Gateway) -> list[float]:
    return [step.started_s - step.arrived_s for step in gateway.records[len(gateway.records) // 20 :] if step.started_s >= 0]


def test_the_formulas_give_the_published_numbers() -> None:
    assert oracles.erlang_c(4, 3.6) == pytest.approx(0.7878, abs=1e-4)
    assert oracles.mmc_wait_s(4, 3.6, 1.0) == pytest.approx(1.969, abs=1e-3)
    assert oracles.mmc_wait_quantile_s(4, 3.6, 1.0, 0.99) == pytest.approx(10.92, abs=5e-3)
    assert oracles.mmck_utilisation(8, 16, 8.0) == pytest.approx(0.918, abs=1e-3)
    assert oracles.mmck_utilisation(8, 16, 16.0) == pytest.approx(0.9997, abs=1e-4)
    assert oracles.md1_wait_s(0.9, 1.0) == pytest.approx(oracles.mg1_wait_s(0.9, 1.0, 1.0)) == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("servers", "rate", "kind", "expected"),
    [
        (4, 2.8, "exp", lambda: oracles.mmc_wait_s(4, 2.8, 1.0)),
        (1, 0.7, "const", lambda: oracles.md1_wait_s(0.7, 1.0)),
        (1, 0.5, "bimodal", lambda: oracles.mg1_wait_s(0.5, 1.0, 0.9 * 0.25 + 0.1 * 30.25)),
    ],
)
def test_without_policies_the_simulation_waits_as_the_formulas_say(
    servers: int, rate: float, kind: str, expected: Callable[[], float]
) -> None:
    means = [sum(found) / len(found) for found in (waits(simulate(seed, servers, rate, kind, 40_000)) for seed in (1, 2))]
    assert sum(means) / len(means) == pytest.approx(expected(), rel=0.08)


def test_a_limit_with_a_bounded_queue_is_the_erlang_loss_system() -> None:
    stack = Stack(({"use": "fixed_limit", "limit": 8}, {"use": "bounded_wait", "max_waiting": 0}))
    gateway = simulate(1, 8, 16.0, "exp", 30_000, stack)
    done = sum(step.outcome == "ok" for step in gateway.records) / len(gateway.records)
    assert done == pytest.approx(1 - oracles.erlang_b(8, 16.0), rel=0.03)
    assert {step.outcome for step in gateway.records} == {"ok", "QUEUE_FULL"}


def test_the_oracle_of_overload_is_mmck() -> None:
    gateway = simulate(1, 8, 16.0, "exp", 30_000, a1_overload.oracle(8))
    done = sum(step.outcome == "ok" for step in gateway.records) / len(gateway.records)
    assert done == pytest.approx(oracles.mmck_utilisation(8, 16, 16.0) / 2, rel=0.03)
    shares = oracles.mmck(8, 16, 16.0)
    latency_s = sum(count * share for count, share in enumerate(shares)) / (16.0 * (1 - shares[-1]))  # Little's law
    latencies = [step.latency_s for step in gateway.records if step.outcome == "ok"]
    assert sum(latencies) / len(latencies) == pytest.approx(latency_s, rel=0.03)


def test_the_same_seed_brings_the_same_work_whatever_the_policies_decide() -> None:
    strict = Stack(({"use": "fixed_limit", "limit": 1}, {"use": "bounded_wait", "max_waiting": 0}))
    offered = [[(step.arrived_s, step.service_s) for step in simulate(5, 2, 4.0, "exp", 400, stack).records] for stack in (None, strict)]
    assert offered[0] == offered[1]


def test_the_same_seed_is_the_same_run() -> None:
    def trace(seed: int) -> list[tuple[float, str]]:
        stack = Stack(({"use": "fixed_limit", "limit": 2}, {"use": "bounded_wait", "max_waiting": 3}))
        return [(step.ended_s, step.outcome) for step in simulate(seed, 2, 4.0, "bimodal", 400, stack).records]

    assert trace(3) == trace(3) != trace(4)


def test_a_hidden_queue_and_a_backend_that_hangs() -> None:
    for hidden in (False, True):
        simulation = engine.Simulation(1)
        server = engine.Server(simulation, 1, hidden_queue=hidden)
        ended: list[tuple[float, float]] = []
        for _ in range(2):
            step = engine.StepRecord(FLOW, 0.0, 1.0)
            server.submit(step, lambda queue_s, service_s, ending, ended=ended: ended.append((queue_s, service_s)))
        simulation.run(5)
        assert ended == [(0.0, 1.0), (0.0, 2.0) if hidden else (1.0, 1.0)]
    simulation = engine.Simulation(1)
    endings: list[Ending] = []
    engine.Server(simulation, 1, timeout_s=3.0).submit(engine.StepRecord(FLOW, 0.0, 1.0), lambda *answer: endings.append(answer[2]))
    simulation.run(5)
    assert endings == [Ending.DROPPED]


def test_who_waits_goes_on_after_the_decision_and_not_within_it() -> None:
    simulation = engine.Simulation(1)
    stack = Stack(({"use": "fixed_limit", "limit": 1}, {"use": "bounded_wait", "max_waiting": 1}))
    permits = stack.permits(simulation.policy_random.random)
    gateway = engine.Gateway(simulation, engine.Server(simulation, 1), permits)
    told: list[tuple[str, int]] = []
    for _ in range(3):
        gateway.offer(FLOW, 1.0, lambda step: told.append((step.outcome, permits.gate(FLOW.scope).inflight)))
    simulation.run(5)
    assert told == [("QUEUE_FULL", 1), ("ok", 1), ("ok", 0)], "its permit is given back before a client hears that its step is done"
    assert [step.refusal is not None for step in gateway.records] == [False, False, True]
    assert permits.gate(FLOW.scope).inflight == 0


def test_a_step_whose_deadline_is_over_is_not_executed_and_a_hidden_wait_not_told() -> None:
    flow = Flow("t", "x", Kind.INFER, Lane.STANDARD, deadline_s=1.5)
    for hidden in (False, True):
        simulation = engine.Simulation(1)
        server = engine.Server(simulation, 1, hidden_queue=hidden)
        gateway = engine.Gateway(simulation, server, None)
        steps = [gateway.offer(flow, 1.0) for _ in range(3)]
        simulation.run(2)
        assert [step.outcome for step in steps] == ["ok", "ok", "late"]
        assert server.busy_s == 2.0
        assert server.average_wait_s() == (0.0 if hidden else 2.0), "of the last second only"


def test_capacity_changes_in_mid_run() -> None:
    simulation = engine.Simulation(1)
    server = engine.Server(simulation, 2)
    gateway = engine.Gateway(simulation, server, None)
    steps = [gateway.offer(FLOW, 1.0) for _ in range(6)]
    simulation.at(0.5, lambda: server.set_slots(1))
    simulation.at(2.5, lambda: server.set_slots(3))
    simulation.run(9)
    assert [step.ended_s for step in steps] == [1.0, 1.0, 2.0, 3.0, 3.5, 3.5]


def test_a_stack_exchanges_the_policies_of_a_slot() -> None:
    stack = Stack(({"use": "token_bucket"}, {"use": "fixed_limit"}, {"use": "bounded_wait"}))
    assert [table["use"] for table in stack.with_({"use": "fixed_limit", "limit": 3}).policies] == [
        "token_bucket",
        "bounded_wait",
        "fixed_limit",
    ]
    assert [table["use"] for table in stack.without(Slot.ADMISSION, Slot.LIMIT).policies] == ["bounded_wait"]


def test_verdicts() -> None:
    measured = [Measured("p", "w", "share", value, 0.9, at_most=False) for value in (0.9, 0.94, 0.92)]
    control = [Measured("bad", "w", "share", 0.5, 0.9, at_most=False, control=True)]
    passed = [Measured("bad", "w", "other", 0.95, 0.9, at_most=False, control=True)]
    first, second, third = report.rows("X", [*measured, *control, *passed])
    assert (first.value, round(first.interval, 4), first.verdict, first.bad) == (pytest.approx(0.92), 0.0497, "reached", False)
    assert (second.verdict, second.bad) == ("fails, as it should", False)
    assert (third.verdict, third.bad) == ("CONTROL PASSED", True)
    assert "0.92 ± 0.05" in report.text([first])


def test_no_number_is_no_success_not_even_of_a_control() -> None:
    (row,) = report.rows("X", [Measured("bad", "w", "share", float("nan"), 0.9, control=True)])
    assert (row.verdict, row.bad) == ("NOT MEASURED", True)
    assert json.loads(json.dumps(report.document([row]), allow_nan=False))[0]["value"] is None


PLUGIN = """
from gateway import PolicyType, Slot, hookimpl
from plugins.fixed_limit import FixedLimit, FixedLimitConfig

class Mine(FixedLimit):
    pass

@hookimpl
def nearloop_policy_types():
    return [PolicyType("mine", Slot.LIMIT, FixedLimitConfig, Mine)]

TAKEN = PolicyType("fixed_limit", Slot.LIMIT, FixedLimitConfig, Mine)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "lab_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lab_plugin", raising=False)
    return "lab_plugin"


def test_a_policy_of_ones_own_replaces_those_of_its_slot(plugin: str) -> None:
    for name in ("Mine", "mine", ""):
        stack = lab.stack_of(f"{plugin}:{name}")
        limits = [table["use"] for table in stack.policies if stack.slots()[table["use"]] is Slot.LIMIT]
        assert (stack.name, limits) == ("mine", ["mine"])
        built = stack.build().one(Slot.LIMIT)
        assert built is not None
        assert type(built.policy).__name__ == "Mine"


def test_a_policy_that_is_not_there_is_named(plugin: str) -> None:
    with pytest.raises(ValueError, match=r"'Yours' is no policy type .* lab_plugin brings mine"):
        lab.stack_of(f"{plugin}:Yours")
    with pytest.raises(ValueError, match="'no_such_module' cannot be imported"):
        lab.stack_of("no_such_module:Mine")
    with pytest.raises(ConfigError, match="policy type 'fixed_limit' is brought by"):
        lab.stack_of(f"{plugin}:TAKEN")


def test_a_scenario_that_is_not_there_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lab", "A11"])
    with pytest.raises(SystemExit, match="2"):
        lab.parse_arguments()
    assert "there is no scenario 'A11'; did you mean A1?" in capsys.readouterr().err


def test_a_scenario_that_cannot_be_imported_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    known = lab.modules()
    monkeypatch.setattr(lab, "modules", lambda: {"A2": known["A2"], "Z1": "tests.lab.z1_missing"})
    seeds, failures = lab.seeds_of(argparse.Namespace(names=["A2", "Z1"], seeds=3, quick=False))
    assert seeds == {"A2": range(1, 4)}
    assert [failure.split(":")[0] for failure in failures] == ["Z1"]

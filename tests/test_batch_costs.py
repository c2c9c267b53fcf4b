"""What a worker has learnt about batches on its way to a person: heartbeat, ListTargets, `nearloop targets`."""

import json

import pytest

from gateway.cli_output import show_targets
from gateway.config import parse
from gateway.edge.catalogue import read_worker, write_worker
from gateway.edge.convert import target_from_proto, target_to_proto
from gateway.testing import ManualClock, MemoryBus
from gateway.types import BatchCost, Kind, Target, TargetStatus, WorkerInfo
from workers.runtime import WorkerRuntime
from workers.tools import ToolsExecutor

COST = BatchCost(0.0121, 0.0019, 340)
INFO = WorkerInfo("w", "home", Kind.INFER, ("infer.plan",), 32, 3, batch_costs={"infer.plan": COST})


def test_it_travels_in_the_heartbeat() -> None:
    assert read_worker(write_worker(INFO)) == INFO
    assert read_worker(b'{"id": "w", "region": "home", "kind": "tool", "targets": []}').batch_costs == {}
    newer = json.loads(write_worker(INFO))
    newer["batch_costs"]["infer.plan"]["curve"] = [1, 2]
    assert read_worker(json.dumps(newer).encode()) == INFO


@pytest.mark.parametrize("costs", [5, [1], "x", {"infer.plan": 5}, {"infer.plan": {"fixed_s": 1.0}}])
def test_what_is_no_cost_makes_no_worker(costs: object) -> None:
    damaged = json.loads(write_worker(INFO)) | {"batch_costs": costs}
    with pytest.raises((ValueError, TypeError, KeyError)):
        read_worker(json.dumps(damaged).encode())


async def test_a_worker_tells_what_it_was_told() -> None:
    bus = MemoryBus(parse({}), ManualClock())
    costs = {"infer.plan": COST}
    runtime = WorkerRuntime(parse({}), Kind.TOOL, "home", "w", bus.worker("w"), ToolsExecutor(parse({})), batch_costs=lambda: costs)
    assert runtime.info().batch_costs == {"infer.plan": COST}


@pytest.mark.parametrize("cost", [COST, BatchCost(0.0, 0.0, 1), None])
def test_it_is_part_of_a_listed_target(cost: BatchCost | None) -> None:
    status = TargetStatus(Target(Kind.INFER, "plan"), ("home",), cost)
    assert target_from_proto(target_to_proto(status)).batch_cost == cost


def test_people_see_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    known, unknown = TargetStatus(Target(Kind.INFER, "plan"), ("home",), COST), TargetStatus(Target(Kind.TOOL, "docs"), ("home",))
    show_targets([known, unknown], as_json=False)
    head, plan, docs = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert "batch cost" in head
    assert "12.1 ms + 1.9 ms each" in plan
    assert "ms" not in docs
    show_targets([unknown], as_json=False)
    assert "batch cost" not in capsys.readouterr().out
    show_targets([known, unknown], as_json=True)
    shown = [json.loads(line)["batch_cost"] for line in capsys.readouterr().out.splitlines()]
    assert shown == [{"fixed_s": 0.0121, "each_s": 0.0019, "batches": 340}, None]

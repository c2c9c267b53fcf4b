"""Targets and workers as JSON values of the live catalogue. Pure."""

import json
from dataclasses import asdict
from typing import Any

from gateway.types import BatchCost, Kind, Target, TensorSpec, WorkerInfo


def write_target(target: Target) -> bytes:
    return json.dumps(asdict(target), default=_plain).encode()


def read_target(data: bytes) -> Target:
    """Raises ValueError, TypeError or KeyError for what is not a target. Fields of a newer version are left out."""
    found = _known(Target, json.loads(data))
    found["kind"] = Kind(found["kind"])
    for name in ("tensor_inputs", "tensor_outputs"):
        found[name] = tuple(TensorSpec(one["name"], one["datatype"], tuple(one["shape"])) for one in found.get(name, ()))
    found["regions"] = tuple(found.get("regions", ()))
    return Target(**found)


def write_worker(info: WorkerInfo) -> bytes:
    return json.dumps(asdict(info)).encode()


def read_worker(data: bytes) -> WorkerInfo:
    """Raises ValueError, TypeError or KeyError for what is not a worker."""
    found = _known(WorkerInfo, json.loads(data))
    costs = {scope: BatchCost(**_known(BatchCost, cost)) for scope, cost in dict(found.get("batch_costs", ())).items()}
    return WorkerInfo(**found | {"kind": Kind(found["kind"]), "targets": tuple(found["targets"]), "batch_costs": costs})


def _known(cls: type[Target] | type[WorkerInfo] | type[BatchCost], found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return {name: value for name, value in found.items() if name in cls.__dataclass_fields__}


def _plain(value: object) -> Any:
    """Mappings that are not dicts, such as a read-only view of a schema."""
    return dict(value)  # type: ignore[call-overload]

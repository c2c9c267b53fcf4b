"""The models that a Triton serves now, as targets. Asks repository index, model metadata and model configuration."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2

from gateway import subjects
from gateway.policy import ModelView
from gateway.types import Kind, Target, TensorSpec
from workers.triton_codec import Model

log = logging.getLogger("nearloop.worker.triton")

CALL_TIMEOUT_S = 5.0
LEAST_SLOTS = 16
MOST_SLOTS = 256


@dataclass(frozen=True, slots=True)
class Served:
    """A ready model: what the codec knows of it, the target that is announced, and what a batching policy sees of it."""

    version: str
    model: Model
    target: Target
    view: ModelView

    @property
    def merges(self) -> bool:
        """It takes batches, and nobody but the worker makes them."""
        return self.view.max_batch_size > 1 and not self.view.server_batches


class TritonCatalogue:
    """Keeps what is known of each model until its version changes or it is no longer ready."""

    def __init__(self, stub: Any, home_region: str) -> None:
        self._stub = stub
        self._home_region = home_region
        self._refused: set[str] = set()

    async def read(self, known: dict[str, Served]) -> dict[str, Served]:
        """The ready models by name. Raises grpc.aio.AioRpcError."""
        index = await self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=CALL_TIMEOUT_S)
        versions: dict[str, str] = {}
        for entry in index.models:
            if subjects.is_id(entry.name):
                versions[entry.name] = max(versions.get(entry.name, ""), entry.version, key=_version_order)
            elif entry.name not in self._refused:
                self._refused.add(entry.name)
                log.warning("model %r is left out: a target's name has %s", entry.name, subjects.ID_RULE)
        fresh = [name for name, version in versions.items() if name not in known or known[name].version != version]
        read = await asyncio.gather(*(self._read_model(name, versions[name]) for name in fresh))
        return {name: known[name] for name in versions if name not in fresh} | dict(zip(fresh, read, strict=True))

    async def _read_model(self, name: str, version: str) -> Served:
        metadata = await self._stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=name), timeout=CALL_TIMEOUT_S)
        answer = await self._stub.ModelConfig(service_pb2.ModelConfigRequest(name=name), timeout=CALL_TIMEOUT_S)
        config = answer.config
        inputs, outputs = _specs(metadata.inputs), _specs(metadata.outputs)
        model = Model(name, inputs, outputs, config.model_transaction_policy.decoupled)
        stateless = not config.HasField("sequence_batching")
        target = Target(
            Kind.INFER,
            name,
            description=_description(name, metadata.platform or config.backend, config.max_batch_size, model.decoupled),
            home_region=self._home_region,
            slots=_slots(config),
            read_only=stateless,
            idempotent=stateless,
            tensor_inputs=inputs,
            tensor_outputs=outputs,
            max_batch_size=config.max_batch_size,
        )
        return Served(version, model, target, _view(name, config))


def _version_order(version: str) -> tuple[int, str]:
    return (int(version), "") if version.isdecimal() else (-1, version)


def _specs(tensors: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in tensors)


def _instances(config: Any) -> int:
    """The count of a group is for each of its GPUs."""
    return sum(group.count * max(1, len(group.gpus)) for group in config.instance_group) or 1


def _view(name: str, config: Any) -> ModelView:
    """Sequences and ensembles are scheduled by Triton as well. A decoupled model's answers cannot be told apart in a batch of ours."""
    server_batches = config.WhichOneof("scheduling_choice") is not None
    takes_ours = server_batches or not config.model_transaction_policy.decoupled
    return ModelView(name, config.max_batch_size if takes_ours else 0, server_batches, _instances(config))


def _slots(config: Any) -> int:
    """Enough for a full batch in every instance and another one that gathers meanwhile."""
    batches: int = 2 * config.max_batch_size * _instances(config)
    return max(LEAST_SLOTS, min(batches, MOST_SLOTS))


def _description(name: str, platform: str, max_batch_size: int, decoupled: bool) -> str:
    words = [f"model {name} in Triton"]
    words += [f"platform {platform}"] if platform else []
    words += [f"batches up to {max_batch_size}"] if max_batch_size else []
    words += ["streams tokens"] if decoupled else []
    return ", ".join(words)

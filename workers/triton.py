"""The executor for models in Triton Inference Server: one of them, or several replicas that serve the same models.

One channel to each. A step's replica is chosen first (`replicas`), then it is batched among the steps of that replica: a batch is one
request or one moment of one server, so a batch made before the choice would take runs away from the replica that is warm for them.

For a model with a batcher of Triton's own, steps are separate requests; the batching policy may hold them back so that they
arrive there together, and the slots of the target bound how many are there. For one that takes batches and has none, the worker is the
batcher: steps that can be are merged into one request, and no more executions are in a Triton than the model has instances.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gateway.clock import Clock, SystemClock
from gateway.config import Config
from gateway.errors import InvalidStep, Unavailable
from gateway.ports import Work
from gateway.types import Kind, Payload, Step, Target
from workers.batching import Batching
from workers.catalogue import merge_target
from workers.rendezvous import highest
from workers.replicas import agreed, choose
from workers.triton_calls import Metadata
from workers.triton_catalogue import Served
from workers.triton_codec import Form, Model, encode
from workers.triton_replica import WITHOUT_IT, NotTaken, TritonReplica

log = logging.getLogger("nearloop.worker.triton")

Contract = tuple[Model, bool]  # inputs, outputs, whether it streams; whether it keeps no state


class _Seat(NamedTuple):
    """A model in one of the replicas."""

    replica: TritonReplica
    served: Served

    @property
    def contract(self) -> Contract:
        return self.served.model, self.served.target.read_only


class TritonExecutor:
    """Serves every ready model of its Tritons; models and servers that come and go later are noticed within about a second."""

    def __init__(
        self,
        config: Config,
        region: str,
        *,
        batching: Batching | None = None,
        clock: Clock | None = None,
        random_source: Callable[[], float] = random.random,
    ) -> None:
        """region is where this worker is; the models' home is the region of the configuration's [triton]."""
        self._config = config
        self._max_message_bytes = config.triton.max_message_bytes
        self._batching = batching
        clock = clock or SystemClock()
        self.replicas = tuple(
            TritonReplica(address, config.triton.region, self._max_message_bytes, clock, random_source, self._settle)
            for address in config.triton.addresses
        )
        self._looked = False  # at all: before that, the first to answer would say what a model is
        self._found: dict[str, list[_Seat]] = {}  # every model of the replicas that are up
        self._seats: dict[str, dict[str, _Seat]] = {}  # those that agree, by address
        self._contracts: dict[str, Contract] = {}
        self._odd: set[tuple[str, str, Contract]] = set()  # what was said
        self._announced: dict[str, Target] = {}  # a model that is gone stays a target: its steps wait in their queue
        self._refreshers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns when one replica serves a model. Raises Unavailable while none does."""
        if not self.replicas:
            raise Unavailable("no Triton is configured: give its gRPC address as [triton] url or --triton")
        self._looked = False
        for one in self.replicas:
            one.connect()
        outcomes = await asyncio.gather(*(one.refresh() for one in self.replicas), return_exceptions=True)
        self._looked = True
        self._settle()
        problems = []
        for one, outcome in zip(self.replicas, outcomes, strict=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, Unavailable):
                raise outcome
            problems.append(
                outcome.message if outcome is not None else f"Triton at {one.address} serves no model" if not one.served else ""
            )
        if not self._seats:
            raise Unavailable("; ".join(problems))
        for problem in filter(None, problems):
            log.warning("%s; %s", problem, WITHOUT_IT)
        self._refreshers = [asyncio.create_task(one.keep_fresh()) for one in self.replicas]

    async def close(self) -> None:
        for task in self._refreshers:
            task.cancel()
        await asyncio.gather(*self._refreshers, return_exceptions=True)
        self._refreshers = []
        if self._batching is not None:
            await self._batching.close()
        for one in self.replicas:
            await one.close()
        self._seats = {}

    def targets(self) -> Sequence[Target]:
        return tuple(self._announced.values())

    def ready(self, target: str) -> bool:
        return any(seat.replica.ready(target) for seat in self._seats.get(target, {}).values())

    # ---- steps ---------------------------------------------------------------------------------------------------------------

    async def execute(self, work: Work) -> Payload:
        """Raises InvalidStep, StepFailed, Expired; Unavailable while no replica takes steps for the model."""
        step = work.step
        seat = self._choose(step, ())
        if seat is None:
            raise self._away(step.target)
        model = seat.served.model
        request, form = encode(model, step.input, step.id)
        if len(step.input.data) > self._max_message_bytes // 2 and request.ByteSize() > self._max_message_bytes:
            raise InvalidStep([("input", f"is larger than the {self._max_message_bytes} bytes that go to Triton in one message")])
        metadata = [("traceparent", step.traceparent)] if step.traceparent else []
        if step.tracestate:
            metadata.append(("tracestate", step.tracestate))
        tried: list[str] = []
        while True:
            try:
                with seat.replica.at_work(step.target):
                    return await self._execute_at(seat, work, request, form, metadata)
            except NotTaken:
                tried.append(seat.replica.address)
                other = self._choose(step, tried) if self._may_repeat(step.target) else None
                if other is None or other.served.model != model:
                    raise
                seat = other

    def _choose(self, step: Step, tried: Sequence[str]) -> _Seat | None:
        """A replica that refused a step for the model lately is left out, unless there is no other."""
        name = step.target
        seats = self._seats.get(name, {})
        seats = {address: seat for address, seat in seats.items() if address not in tried and seat.replica.ready(name)}
        if not seats:
            return None
        if len(seats) == 1 and not tried:
            return next(iter(seats.values()))
        run = f"{step.tenant}/{step.run}" if step.run else ""
        if not self._contracts[name][1]:
            # The model keeps a state: a run keeps to one replica, however much that has to do, and steps without a run to one as well.
            return seats[highest(run, seats)]
        rested = {address: seat for address, seat in seats.items() if seat.replica.is_rested(name)}
        if not rested and tried:
            return None
        chosen = rested or seats
        return chosen[choose({address: seat.replica.in_flight[name] for address, seat in chosen.items()}, run)]

    def _may_repeat(self, name: str) -> bool:
        """A replica that did not answer may have executed the step all the same."""
        target = merge_target(self._config.target_section(Kind.INFER, name), self._announced[name])
        return target.read_only or target.idempotent

    async def _execute_at(self, seat: _Seat, work: Work, request: Any, form: Form, metadata: Metadata) -> Payload:
        replica, served = seat
        model = served.model
        if model.name in replica.lost:
            return await replica.try_again(work, model, request, form, metadata)
        if self._batching is None:
            return await replica.send(work, model, request, form, metadata)
        target, address, clock = self._announced[model.name], replica.address, self._batching.clock
        share = served.target.slots / target.slots
        if served.merges:
            gatherer = self._batching.gatherer(target, served.view, lambda calls: replica.infer_together(calls, clock), address, share)
            if gatherer is not None:
                return await replica.gather(work, gatherer, model, request, form, metadata)
        batcher = self._batching.batcher(target, served.view, address, share)
        if batcher is None:
            return await replica.send(work, model, request, form, metadata)
        batch, answered = await batcher.enter(work.remaining_s()), False
        try:
            output = await replica.send(work, model, request, form, metadata)
            answered = True
            return output
        finally:
            batcher.leave(batch, answered=answered)

    def _away(self, model: str) -> Unavailable:
        for seat in self._seats.get(model, {}).values():
            if model in seat.replica.lost:
                return seat.replica.no_process(model)
        return Unavailable(f"model {model} is not ready in Triton at {', '.join(one.address for one in self.replicas)}")

    # ---- what there is ---------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """A replica was looked at: which models are there, and which replicas agree about them?"""
        if not self._looked:
            return
        found: dict[str, list[_Seat]] = {}
        for one in self.replicas:
            for name, served in one.served.items() if one.up else ():
                found.setdefault(name, []).append(_Seat(one, served))
        for name in self._seats.keys() - found.keys():
            del self._seats[name]
        for name, seats in found.items():
            if seats != self._found.get(name):
                self._settle_model(name, seats)
        self._found = found

    def _settle_model(self, name: str, seats: list[_Seat]) -> None:
        contract = self._contracts[name] = agreed([seat.contract for seat in seats], self._contracts.get(name))
        fitting = [seat for seat in seats if seat.contract == contract]
        self._seats[name] = {seat.replica.address: seat for seat in fitting}
        targets = [seat.served.target for seat in fitting]
        self._announced[name] = replace(
            targets[0],
            slots=sum(target.slots for target in targets),
            max_batch_size=min(target.max_batch_size for target in targets),
        )
        for replica, served in seats:
            odd = (replica.address, name, (served.model, served.target.read_only))
            if odd[2] == contract:
                self._odd = {one for one in self._odd if one[:2] != odd[:2]}
            elif odd not in self._odd:
                self._odd.add(odd)
                others = ", ".join(self._seats[name])
                what = _difference(contract, odd[2])
                log.error("model %s in Triton at %s is left out: its %s differ from those at %s", name, replica.address, what, others)


def _difference(one: Contract, other: Contract) -> str:
    words = [word for word in ("inputs", "outputs") if getattr(one[0], word) != getattr(other[0], word)]
    return " and ".join(words) or "ways to execute it (streaming, sequences)"

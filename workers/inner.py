"""Steps that a step needs: an executor's own calls to other targets, through the same kernel and so past the same policies.

They are charged to the tenant of the outer step, keep its lane, run and trace, and end by its deadline.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from gateway.ports import Executor, StepService, Work
from gateway.types import Kind, Payload, Step, Target

_OUTER: ContextVar[Step] = ContextVar("outer step")


class InnerCalls:
    """Wraps an executor so that `infer` and `retrieve` know for which step they are called."""

    def __init__(self, service: StepService, region: str, new_id: Callable[[], str]) -> None:
        self._service = service
        self._new_id = new_id
        self._region = region

    def wrap(self, executor: Executor) -> Executor:
        return _Wrapped(executor)

    async def infer(self, model: str, payload: Payload) -> Payload:
        """The output of a model, as a step of its own. Raises the errors of `gateway.errors`."""
        return await self._call(Kind.INFER, model, payload, 0.0)

    async def retrieve(self, collection: str, payload: Payload, before_s: float) -> Payload:
        """The answer of a collection, likewise, with a deadline so long before the outer step's."""
        return await self._call(Kind.RETRIEVE, collection, payload, before_s)

    def collection(self, name: str) -> Target | None:
        """What is announced of a collection, by whichever worker serves it; None while it is not known."""
        return self._service.target(Kind.RETRIEVE, name)

    async def _call(self, kind: Kind, target: str, payload: Payload, before_s: float) -> Payload:
        outer = _OUTER.get()
        step = dataclasses.replace(
            outer,
            id=self._new_id(),
            kind=kind,
            target=target,
            input=payload,
            deadline_s=outer.deadline_s - before_s,
            idempotency_key="",
            client_region=self._region,
            stream=False,
        )
        return (await self._service.execute(step)).result.output


class _Wrapped:
    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def start(self) -> None:
        await self._executor.start()

    async def close(self) -> None:
        await self._executor.close()

    def targets(self) -> Sequence[Target]:
        return self._executor.targets()

    def ready(self, target: str) -> bool:
        return self._executor.ready(target)

    async def execute(self, work: Work) -> Payload:
        _OUTER.set(work.step)  # seen by this step's task only
        return await self._executor.execute(work)

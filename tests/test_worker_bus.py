"""The worker's side of the bus on NATS when NATS does not answer, and while it closes."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from bus_rig import eventually, eventually_true, make_step, pull
from nats_process import NatsProcess
from test_bus_nats import NatsRig

from gateway import subjects
from gateway.errors import Unavailable
from gateway.ports import Subscription


@pytest.fixture
async def rig(own_nats_server: NatsProcess) -> AsyncIterator[NatsRig]:
    rig = NatsRig(own_nats_server.url)
    await rig.link.start(10.0)
    yield rig
    await rig.close()


@pytest.mark.parametrize("what", ["on_cancel", "serve_replay"])
async def test_a_subscription_that_was_not_confirmed_is_closed(rig: NatsRig, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await rig.worker()
    before = set(worker.control._subscriptions)

    async def barrier(timeout_s: float = 10.0) -> None:
        raise Unavailable("NATS did not answer")

    monkeypatch.setattr(worker.control, "barrier", barrier)
    subscribe: Callable[[object], Awaitable[Subscription]] = getattr(worker, what)
    with pytest.raises(Unavailable):
        await subscribe(lambda *_: None)
    assert set(worker.control._subscriptions) == before


async def test_without_its_bucket_a_step_still_goes_back(rig: NatsRig) -> None:
    gateway, worker = await rig.gateway(), await rig.worker()
    await rig.js.api(f"STREAM.DELETE.KV_{subjects.HANDBACKS_BUCKET}")
    inbox = await pull(rig, worker, 2)
    gateway.execute(make_step(rig), rig.region)
    await worker.hand_back(await inbox.next(), 0.0)
    assert (await inbox.next()).attempt == 2


async def test_what_comes_while_a_puller_closes_is_counted_as_handed_back(rig: NatsRig) -> None:
    gateway, worker = await rig.gateway(), await rig.worker()
    closed = await pull(rig, worker, 1)
    await eventually(lambda: closed.puller.credits == 1)
    (puller,) = worker.pullers
    puller.loop._closed = True  # as between the word to close and the server's answer
    step = make_step(rig)
    gateway.execute(step, rig.region)

    async def counted() -> bool:
        return await worker.hand_backs(step.tenant, step.id, rig.region) == 1

    await eventually_true(counted)
    assert closed.waiting.empty()
    puller.loop._closed = False


async def test_without_an_answer_a_step_still_goes_back(rig: NatsRig) -> None:
    gateway, worker = await rig.gateway(), await rig.worker()
    inbox = await pull(rig, worker, 2)
    gateway.execute(make_step(rig), rig.region)
    delivery = await inbox.next()
    await worker.control.close()  # the connection that notes hand-backs
    await worker.hand_back(delivery, 0.0)
    assert (await inbox.next()).attempt == 2

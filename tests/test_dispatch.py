"""Steps that a gateway waits for, over a link that a test answers by hand."""

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
from bus_rig import WAIT_S, eventually

from gateway.config import NatsSection, parse
from gateway.edge.dispatch import Dispatcher
from gateway.edge.jetstream import JetStream
from gateway.edge.link import Link
from gateway.edge.sites import Sites
from gateway.errors import Expired, Unavailable
from gateway.testing import ManualClock
from gateway.types import Kind, Payload, Step, StepResult

PUBLISH_TIMEOUT_S = 5.0
NEVER_S = 1000.0  # the time-out of requests that nobody answers


class Sent(NamedTuple):
    subject: str
    reply: str


class SilentLink(Link):
    """Takes everything and brings nothing but what a test says."""

    def __init__(self) -> None:
        super().__init__(NatsSection(), (), "test")
        self.sent: list[Sent] = []

    @property
    def connected(self) -> bool:
        return True

    def send(self, subject: str, payload: bytes = b"", headers: bytes = b"", reply: str = "") -> bool:
        self.sent.append(Sent(subject, reply))
        return True

    def deliver(self, subject: str, data: bytes) -> None:
        for subscription in self._subscriptions:
            if subject.startswith(subscription.subject.removesuffix("*")):
                subscription.handler(subject, "", b"", data)

    def steps(self, step_id: str) -> list[Sent]:
        return [one for one in self.sent if one.subject.endswith(f".{step_id}")]


class World:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.link, self.control = SilentLink(), SilentLink()
        regions = [{"name": name, "nats_urls": [f"nats://{name}"], "domain": name} for name in ("home", "iad")]
        sites = Sites(JetStream(self.control, NEVER_S), parse({"regions": regions}), "home")
        self.dispatcher = Dispatcher(self.clock, self.link, self.link, sites, PUBLISH_TIMEOUT_S)

    def execute(self, step_id: str, within_s: float, *, stored: bool = True, region: str = "home") -> "asyncio.Future[StepResult]":
        step = Step(step_id, "acme", Kind.TOOL, "echo", Payload(b"{}"), self.clock.wall_s() + within_s)
        future = self.dispatcher.execute(step, region)
        if stored:
            self.link.deliver(self.link.steps(step_id)[-1].reply, b'{"stream":"NL_STEPS_HOME","seq":1}')
        return future

    async def hang_in_a_look(self) -> "asyncio.Future[StepResult]":
        """A look for a lost reply is under way, and nobody answers it."""
        future = self.execute("lost", 600.0)
        self.dispatcher._look_soon()
        await eventually(lambda: len(self.control.sent) == 1)
        return future


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    world.dispatcher.start()
    yield world
    await world.dispatcher.close()


async def ends(future: "asyncio.Future[StepResult]") -> StepResult:
    return await asyncio.wait_for(future, WAIT_S)


async def test_a_look_that_hangs_does_not_hold_up_a_deadline(world: World) -> None:
    await world.hang_in_a_look()
    future = world.execute("s1", 1.0)
    world.clock.advance(1.5)
    with pytest.raises(Expired):
        await ends(future)


async def test_a_look_that_hangs_does_not_hold_up_a_resend(world: World) -> None:
    await world.hang_in_a_look()
    world.execute("s1", 60.0, stored=False)
    world.clock.advance(1.5 * PUBLISH_TIMEOUT_S)
    await eventually(lambda: len(world.link.steps("s1")) == 2)
    assert world.dispatcher.counters["resent"] == 1


async def test_one_round_of_looks_at_a_time(world: World) -> None:
    await world.hang_in_a_look()
    other = world.execute("s1", 600.0)
    world.dispatcher._look_soon()
    late = world.execute("s2", 1.0)
    world.clock.advance(1.5)
    with pytest.raises(Expired):  # so a sweep has passed
        await ends(late)
    assert len(world.control.sent) == 1
    assert not other.done()


async def test_a_look_that_hangs_holds_up_no_look_in_another_region(world: World) -> None:
    await world.hang_in_a_look()
    world.execute("s1", 600.0, region="iad")
    world.dispatcher._look_soon()
    await eventually(lambda: len(world.control.sent) == 2)
    near, far = (sent.subject for sent in world.control.sent)
    assert near == "$JS.API.DIRECT.GET.NL_RESULTS.nl.result.home.acme.lost"
    assert far == "$JS.iad.API.DIRECT.GET.NL_RESULTS.nl.result.iad.acme.s1"


async def test_only_a_mark_can_be_heard(world: World) -> None:
    for mark in ("", "short", "f" * 9, "f.*.>.ff"):
        with pytest.raises(ValueError, match="is not a mark"):
            await world.dispatcher.hear(mark)


async def test_a_closing_gateway_ends_what_it_looks_for(world: World) -> None:
    future = await world.hang_in_a_look()
    await world.dispatcher.close()
    with pytest.raises(Unavailable, match="closing"):
        await ends(future)


async def test_past_its_deadline_a_step_that_was_never_confirmed_is_expired(world: World) -> None:
    future = world.execute("s1", 3 * PUBLISH_TIMEOUT_S, stored=False)
    patient = world.execute("s2", 600.0, stored=False)
    world.clock.advance(4 * PUBLISH_TIMEOUT_S)
    with pytest.raises(Expired):
        await ends(future)
    with pytest.raises(Unavailable, match="did not confirm"):
        await ends(patient)


async def test_a_moment_is_left_for_the_result_that_says_so(world: World) -> None:
    """At its deadline a step is neither sent again nor given up; a worker may be telling that it expired."""
    limit_s = 4 * PUBLISH_TIMEOUT_S
    future = world.execute("s1", limit_s, stored=False)
    patient = world.execute("s2", 600.0, stored=False)
    world.clock.advance(limit_s + 0.05)
    with pytest.raises(Unavailable):  # so a sweep has passed
        await ends(patient)
    assert not future.done()
    assert len(world.link.steps("s1")) == 1
    world.clock.advance(0.1)
    with pytest.raises(Expired):
        await ends(future)

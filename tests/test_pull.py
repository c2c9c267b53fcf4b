"""The pull loop's bookkeeping: credits stay exact whatever the server answers."""

import asyncio
import json

import pytest
from bus_rig import eventually

from gateway.edge.pull import EXPIRES_S, PullLoop
from gateway.errors import TopologyMismatch, Unavailable
from gateway.testing import ManualClock


class FakeSubscription:
    closed = False

    async def close(self) -> None:
        self.closed = True


class FakeLink:
    """Records pull requests; answers are given by the test."""

    def __init__(self) -> None:
        self.connected = True
        self.requests: list[tuple[dict[str, object], str]] = []
        self.on_reconnect: list[object] = []
        self.subscription = FakeSubscription()

    def subscribe(self, _subject: str, handler: object) -> FakeSubscription:
        self.handler = handler
        return self.subscription

    def send(self, _subject: str, payload: bytes = b"", headers: bytes = b"", reply: str = "") -> bool:
        self.requests.append((json.loads(payload), reply))
        return True


class Pulling:
    def __init__(self) -> None:
        self.link, self.clock = FakeLink(), ManualClock()
        self.received: list[str] = []
        self.ensured = 0
        self.refusals: list[Exception] = []
        self.loop = PullLoop(
            self.link,  # type: ignore[arg-type]
            self.clock,
            "$JS.API",
            "S",
            "c",
            "near",
            1,
            lambda subject, *_: self.received.append(subject),
            self._ensure,
        )

    async def _ensure(self) -> None:
        self.ensured += 1
        if self.refusals:
            raise self.refusals.pop()

    async def want(self, credits: int) -> None:
        self.loop.want(credits)
        await eventually(lambda: self.loop.credits >= credits)

    def message(self, subject: str = "nl.step.x") -> None:
        self.link.handler(subject, "$JS.ACK.x", b"", b"")  # type: ignore[operator]

    def status(self, text: str, request: int = -1, left: int = 0) -> None:
        header = f"NATS/1.0 {text}\r\nNats-Pending-Messages: {left}\r\nNats-Pending-Bytes: 0\r\n\r\n"
        self.link.handler(self.link.requests[request][1], "", header.encode(), b"")  # type: ignore[operator]


@pytest.fixture
def pulling() -> Pulling:
    return Pulling()


async def test_a_request_says_all(pulling: Pulling) -> None:
    await pulling.want(5)
    request, _ = pulling.link.requests[0]
    assert request == {"batch": 5, "expires": 30_000_000_000, "idle_heartbeat": 5_000_000_000, "group": "near", "priority": 1}


async def test_wants_of_one_moment_are_one_request(pulling: Pulling) -> None:
    for credits in (1, 3, 8):
        pulling.loop.want(credits)
    await eventually(lambda: pulling.loop.credits == 8)
    assert [request["batch"] for request, _ in pulling.link.requests] == [8]


async def test_an_expired_request_gives_back_what_did_not_come(pulling: Pulling) -> None:
    await pulling.want(5)
    for _ in range(2):
        pulling.message()
    assert pulling.loop.credits == 3
    await pulling.want(5)
    pulling.status("408 Request Timeout", request=0, left=3)
    assert pulling.loop.credits == 2
    await eventually(lambda: pulling.loop.credits == 5)
    assert [request["batch"] for request, _ in pulling.link.requests] == [5, 2, 3]


async def test_messages_may_come_from_a_younger_request(pulling: Pulling) -> None:
    await pulling.want(4)
    await pulling.want(6)
    for _ in range(4):
        pulling.message()  # perhaps two of them for the second request
    pulling.status("408 Request Timeout", request=0, left=2)
    assert pulling.loop.credits == 0


async def test_a_heartbeat_changes_nothing(pulling: Pulling) -> None:
    await pulling.want(2)
    pulling.status("100 Idle Heartbeat")
    assert pulling.loop.credits == 2


@pytest.mark.parametrize("text", ["409 Consumer Deleted", "503"])
async def test_a_missing_consumer_is_made_again(pulling: Pulling, text: str) -> None:
    await pulling.want(3)
    pulling.status(text, left=3)
    assert pulling.loop.credits == 0
    await eventually(lambda: pulling.loop.credits == 3)
    assert (pulling.ensured, pulling.loop.repairs) == (1, 1)


async def test_another_refusal_is_tried_again_later(pulling: Pulling) -> None:
    await pulling.want(3)
    pulling.status("409 Leadership Change", left=3)
    assert pulling.loop.credits == 0
    await eventually(lambda: pulling.loop.credits == 3)
    assert pulling.ensured == 0


async def test_silence_makes_it_start_again(pulling: Pulling) -> None:
    await pulling.want(3)
    pulling.clock.advance(10.0)
    pulling.loop.check()
    assert pulling.loop.credits == 3
    pulling.clock.advance(10.0)
    pulling.loop.check()
    assert pulling.loop.credits == 0
    await eventually(lambda: pulling.loop.credits == 3)
    assert pulling.ensured == 1


async def test_a_lost_end_of_a_request_is_noticed(pulling: Pulling) -> None:
    await pulling.want(3)
    pulling.clock.advance(EXPIRES_S + 5.0)
    pulling.status("100 Idle Heartbeat")
    pulling.clock.advance(10.0)
    pulling.status("100 Idle Heartbeat")
    pulling.loop.check()
    await eventually(lambda: len(pulling.link.requests) == 2)
    assert pulling.loop.credits == 3


async def test_reconnecting_asks_anew_and_ignores_the_past(pulling: Pulling) -> None:
    await pulling.want(3)
    pulling.loop._on_reconnect()
    assert pulling.loop.credits == 0
    await eventually(lambda: pulling.loop.credits == 3)
    pulling.status("408 Request Timeout", request=0, left=3)
    assert pulling.loop.credits == 3


async def test_many_fulfilled_requests_leave_nothing_behind(pulling: Pulling) -> None:
    for _ in range(100):
        await pulling.want(4)
        for _ in range(3):
            pulling.message()
    assert pulling.loop.credits <= 4
    assert len(pulling.loop._open) <= 4


async def test_nothing_is_asked_while_disconnected(pulling: Pulling) -> None:
    pulling.link.connected = False
    pulling.loop.want(3)
    await asyncio.sleep(0)
    assert (pulling.loop.credits, pulling.link.requests) == (0, [])
    pulling.link.connected = True
    pulling.loop._on_reconnect()
    await eventually(lambda: pulling.loop.credits == 3)


async def test_closing_asks_no_more(pulling: Pulling) -> None:
    await pulling.want(3)
    await pulling.loop.close()
    pulling.loop.want(9)
    pulling.loop.check()
    await asyncio.sleep(0)
    assert len(pulling.link.requests) == 1
    assert pulling.link.subscription.closed
    assert pulling.link.on_reconnect == []


async def test_a_request_that_gathers_goes_out_at_once_when_little_is_left() -> None:
    pulling = Pulling()
    await pulling.want(4)
    for number in range(1, 4):
        pulling.loop._on_any("s", f"$JS.ACK.S.c.1.{number}.{number}.0.0", b"", b"")
        pulling.loop.want(4)
        if number == 1:
            assert len(pulling.link.requests) == 1, "three of four are out: more is gathered first"
    await asyncio.sleep(0)
    assert len(pulling.link.requests) == 2
    await pulling.loop.close()


async def test_a_consumer_that_cannot_be_made_is_tried_again_until_it_can(pulling: Pulling, caplog: pytest.LogCaptureFixture) -> None:
    pulling.refusals = [Unavailable("away"), TopologyMismatch("differs"), TopologyMismatch("differs")]
    pulling.loop.repair()
    pulling.loop.want(3)
    for tried in (1, 2, 3):
        await eventually(lambda tried=tried: pulling.ensured == tried and pulling.loop.credits == 3)
        pulling.status("503 No Responders Available For Request", left=3)
    await eventually(lambda: pulling.ensured == 4 and pulling.loop.credits == 3)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    await pulling.loop.close()

"""The client's throttle: the formula, its window, and what the client does with it."""

import asyncio
import random

import pytest
from fake_service import ALICE, FakeService, serving

from gateway.client import NearloopClient, RetryPolicy, ThrottlePolicy
from gateway.client_throttle import BUCKETS, MAX_SCOPES, ClientThrottle, is_accept
from gateway.errors import Denied, Expired, InvalidStep, NearloopError, NotFound, Rejected, StepFailed, Unavailable
from gateway.types import Payload, Step

ONCE = RetryPolicy(attempts=1)
TWICE = RetryPolicy(attempts=2, base_s=0.001, max_wait_s=0.002)


def throttle(requests: int, accepts: int, now_s: float = 0.0, **policy: float) -> ClientThrottle:
    """With so many requests in its window; the last one was refused unless all were accepted."""
    made = ClientThrottle(ThrottlePolicy(**policy))  # type: ignore[arg-type]
    for index in range(requests):
        made.answered("x", index < accepts, now_s)
    return made


@pytest.mark.parametrize(
    ("requests", "accepts", "expected"),
    [(100, 100, 0.0), (100, 50, 0.0), (100, 40, 20 / 101), (100, 10, 80 / 101), (1000, 0, 0.9), (19, 0, 0.0), (20, 0, 0.9)],
)
def test_the_probability_is_the_books(requests: int, accepts: int, expected: float) -> None:
    assert throttle(requests, accepts).probability("x", 0.0) == pytest.approx(expected)


def test_k_evidence_and_most_are_parameters() -> None:
    assert throttle(100, 40, k=1.5).probability("x", 0.0) == pytest.approx(40 / 101)
    assert throttle(5, 0, evidence=3).probability("x", 0.0) == pytest.approx(5 / 6)
    assert throttle(100, 0, most=0.5).probability("x", 0.0) == 0.5
    for wrong in ({"k": 0.5}, {"window_s": 0.0}, {"most": 1.1}, {"evidence": 0}):
        with pytest.raises(ValueError):
            ThrottlePolicy(**wrong)


def test_the_window_slides() -> None:
    made = throttle(50, 0, now_s=0.0)
    for index in range(50):
        made.answered("x", index < 15, 60.0)
    assert made.probability("x", 60.0) == pytest.approx(70 / 101)
    assert made.probability("x", 119.9) == pytest.approx(70 / 101)
    assert made.probability("x", 120.0) == pytest.approx(20 / 51), "the first bucket is two minutes old"
    assert made.probability("x", 180.0 + 120.0 / BUCKETS) == 0.0


def test_what_is_refused_here_is_a_request_too() -> None:
    made = throttle(100, 40)
    assert not made.lets("x", 0.0, 0.1)
    assert made.probability("x", 0.0) == pytest.approx(21 / 102)
    assert made.lets("x", 0.0, 0.9)
    assert made.probability("x", 0.0) == pytest.approx(21 / 102), "it counts when it is answered"


def test_scopes_are_apart_and_bounded() -> None:
    made = throttle(100, 0)
    assert made.probability("y", 0.0) == 0.0
    for index in range(MAX_SCOPES):
        made.probability(f"s{index}", 0.0)
    assert made.probability("x", 0.0) == 0.0, "dropped"


def test_enough_accepts_in_a_row_end_it() -> None:
    made = throttle(1000, 0)
    for index in range(20):
        assert made.probability("x", 1.0) > 0.85, index
        made.answered("x", True, 1.0)
    assert made.probability("x", 1.0) == 0.0


@pytest.mark.parametrize(("overload", "sent_for_each_accept"), [(1, 1.0), (2, 2.0), (5, 2.0), (10, 2.0), (40, 4.0)])
def test_about_one_refusal_reaches_the_gateways_for_each_accept(overload: int, sent_for_each_accept: float) -> None:
    """A gateway that takes ten steps a second; at 40 times as many the tenth that is always sent is more than twice what it takes."""
    rng, made, tokens, sent, accepted = random.Random(overload), ClientThrottle(ThrottlePolicy()), 0.0, 0, 0
    for tick in range(400 * 10 * overload):
        now_s, tokens = tick / (10 * overload), min(5.0, tokens + 1 / overload)
        if made.lets("x", now_s, rng.random()):
            accept = tokens >= 1.0
            tokens -= accept
            made.answered("x", accept, now_s)
            if now_s >= 200:
                sent, accepted = sent + 1, accepted + accept
    assert sent / accepted == pytest.approx(sent_for_each_accept, rel=0.12)
    assert accepted >= 0.98 * 200 * 10, "what the gateway can do is used"


@pytest.mark.parametrize(
    ("error", "accept"),
    [
        (None, True),
        (Rejected("full"), False),
        (Rejected("slow down", reason="RATE_LIMITED"), False),
        (Unavailable("gone"), False),
        (Denied("never"), True),
        (Rejected("too much", reason="COST_OVER_BURST"), True),
        (StepFailed("the tool is down", code="UNAVAILABLE"), True),
        (StepFailed("the tool says so", code="RESOURCE_EXHAUSTED"), True),
        (Expired("late"), True),
        (InvalidStep([("a", "b")]), True),
    ],
)
def test_what_is_accepted(error: NearloopError | None, accept: bool) -> None:
    assert is_accept(error) is accept


# ---- in the client -------------------------------------------------------------------------------------------------------------


class Refusing(FakeService):
    """Refuses every step until it is told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.error: NearloopError | None = Rejected("full", reason="OVERLOADED")
        self.on_execute = self.act

    async def act(self, step: Step) -> Payload:
        if self.error:
            raise self.error
        return step.input


async def reasons(client: NearloopClient, count: int) -> list[str]:
    found = []
    for _ in range(count):
        try:
            await client.execute("tool", "echo", {})
            found.append("")
        except NearloopError as error:
            found.append(error.reason)
    return found


async def test_the_client_refuses_by_itself_after_many_refusals_and_stops_when_it_is_over() -> None:
    service = Refusing()
    async with serving(service) as port, NearloopClient(f"127.0.0.1:{port}", ALICE, retries=ONCE) as client:
        assert await reasons(client, 20) == ["OVERLOADED"] * 20
        found = await reasons(client, 200)
        assert set(found) == {"OVERLOADED", "CLIENT_THROTTLED"}
        assert found.count("CLIENT_THROTTLED") > 140, "nine of ten are expected"
        assert len(service.steps) == 20 + found.count("OVERLOADED"), "nothing else was sent"
        with pytest.raises(NotFound):
            await client.execute("tool", "other", {})
        service.error = None
        accepts = 0
        while accepts < 20:
            accepts += (await reasons(client, 1)).count("")
        assert await reasons(client, 30) == [""] * 30


async def test_what_the_callers_see_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry that is held back ends with the gateway's error; a step that is not sent at all has one of its own."""
    monkeypatch.setattr(random, "random", lambda: 0.4)  # before the client takes it
    service, policy = Refusing(), ThrottlePolicy(evidence=1)
    async with serving(service) as port, NearloopClient(f"127.0.0.1:{port}", ALICE, retries=TWICE, throttle=policy) as client:
        assert await reasons(client, 1) == ["OVERLOADED"]
        assert len(service.steps) == 1, "one refusal of one request: the retry is refused with a probability of 1/2"
        with pytest.raises(Rejected) as caught:
            await client.execute("tool", "echo", {})
        assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "CLIENT_THROTTLED")
        assert (caught.value.scope, caught.value.retry_after_s) == ("tool.echo", None)
        assert len(service.steps) == 1
        await client.submit("tool", "echo", {})  # jobs have a window of their own


async def test_the_throttle_can_be_switched_off() -> None:
    service = Refusing()
    async with serving(service) as port, NearloopClient(f"127.0.0.1:{port}", ALICE, retries=ONCE, throttle=None) as client:
        assert await reasons(client, 60) == ["OVERLOADED"] * 60


async def test_what_reached_no_gateway_is_no_refusal() -> None:
    service = Refusing()
    service.error = None
    async with serving(service) as port:
        pass
    async with NearloopClient(f"127.0.0.1:{port}", ALICE, retries=ONCE) as client:
        assert await reasons(client, 30) == ["GATEWAY_UNREACHABLE"] * 30
        async with serving(service, listen=f"127.0.0.1:{port}"):
            while (await reasons(client, 1)) != [""]:
                pass
            assert await reasons(client, 30) == [""] * 30


async def test_streams_and_cancelled_calls() -> None:
    """A stream counts as accepted with its first event; a call that the caller cancelled does not count."""
    service, waiting = FakeService(), []

    async def never(step: Step) -> Payload:
        waiting.append(step)
        await asyncio.Event().wait()
        raise AssertionError

    service.on_execute = never
    async with (
        serving(service) as port,
        NearloopClient(f"127.0.0.1:{port}", ALICE, retries=ONCE, throttle=ThrottlePolicy(evidence=1, most=1.0, k=1.0)) as client,
    ):
        for count in range(1, 6):
            call = asyncio.create_task(client.execute("tool", "echo", {}))
            while len(waiting) < count:
                await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        for _ in range(5):
            assert [item async for item in client.stream("tool", "echo", {})]

"""A6: clients that try each refused request up to three times more, at two and five times what the server can do.

Twenty clients and two gateways before one server of 8 slots, exponential services of 200 ms. Our clients decide with the objects of the
real one (retry policy with the gateways' hints, retry budget of 10 %, throttle); naive ones repeat each refusal after a random wait, as
libraries do without a budget. Beside them clients that never retry: what the server gets done for those is what retries must not lower.

attempts/requests   sent attempts for each request that an application made; locally refused requests are requests too
goodput             executed requests for each second, as a share of those with clients that never retry, same seed. The throttle lets about
                    twice the capacity through, at which a gateway with a short queue idles a little more than at five times
refusals            that reach the gateways for each request that they accept
"""

from random import Random

from gateway.client_pushback import Pushback
from gateway.client_retry import RetryBudget, RetryPolicy
from gateway.client_throttle import ThrottlePolicy
from gateway.core.permit import Permit
from gateway.errors import Rejected
from gateway.policy import Reject
from gateway.types import Flow, Kind, Lane
from tests.lab.engine import Gateway, Server, Simulation, StepRecord, poisson, service_time
from tests.lab.scenario import Measured, Scenario, Stack

SLOTS, SERVICE_S, NETWORK_S = 8, 0.2, 0.002
CLIENTS, GATEWAYS = 20, 2
RETRIES = 3
TIMEOUT_S = 10.0
CLIENT_KINDS = ("ours", "naive", "no retries")


class TellingGateway(Gateway):
    """Keeps what the last refusal said, as the client reads it from the answer."""

    said = Reject("", "")

    def _refused(self, step: StepRecord, permit: Permit, on_end: object) -> None:
        assert permit.refusal is not None
        self.said = permit.refusal.reject
        super()._refused(step, permit, on_end)  # type: ignore[arg-type]


class Client:
    """Makes calls like `gateway.edge.calls.Calls`, on the virtual clock."""

    def __init__(self, world: "World", tenant: str, pushback: Pushback, honours_hints: bool) -> None:
        self.world, self.pushback, self.honours_hints = world, pushback, honours_hints
        self.tenant = tenant

    def request(self) -> None:
        world = self.world
        world.requests += 1
        now_s = world.simulation.now_s
        flow = Flow(self.tenant, "plan", Kind.INFER, Lane.STANDARD, deadline_s=now_s + TIMEOUT_S)
        if self.pushback.begins(flow.scope, now_s):
            self._attempt(flow, 0)

    def _attempt(self, flow: Flow, failures: int) -> None:
        world = self.world
        world.attempts += 1
        gateway = world.simulation.random.choice(world.gateways)
        gateway.offer(flow, world.service_s(), lambda step: self._answered(step, gateway, flow, failures + 1))

    def _answered(self, step: StepRecord, gateway: TellingGateway, flow: Flow, failures: int) -> None:
        simulation = self.world.simulation
        now_s = simulation.now_s
        if step.outcome == "ok":
            self.pushback.answered(flow.scope, None, now_s)
            self.world.succeeded += 1
            return
        said = gateway.said
        error = Rejected(said.message, reason=said.reason, retry_after_s=said.retry_after_s if self.honours_hints else None)
        self.world.was_refused(step)
        self.pushback.answered(flow.scope, error, now_s)
        wait_s = self.pushback.wait_s(error, failures, False, flow.deadline_s - now_s)
        if wait_s is not None:
            simulation.after(wait_s, lambda: self._again(flow, failures))

    def _again(self, flow: Flow, failures: int) -> None:
        if self.pushback.lets(flow.scope, self.world.simulation.now_s):
            self._attempt(flow, failures)


class World:
    """One run: `overload` times the capacity in requests, for duration_s; counts are of the whole run, its cold start included."""

    def __init__(self, stack: Stack, seed: int, kind: str, overload: float, duration_s: float) -> None:
        simulation = self.simulation = Simulation(seed)
        server = Server(simulation, SLOTS)
        permits = [stack.permits(simulation.random.random, lambda: simulation.now_s) for _ in range(GATEWAYS)]
        self.gateways = [TellingGateway(simulation, server, one, NETWORK_S) for one in permits]
        self._draw_s = service_time("exp", SERVICE_S, Random(seed))
        self._undone_s: list[float] = []  # service times of refused attempts
        self.requests = self.attempts = self.succeeded = self.refused = 0
        clients = [self._client(kind, f"tenant{index}") for index in range(CLIENTS)]
        rate_per_s = overload * SLOTS / SERVICE_S
        poisson(simulation, lambda now_s: rate_per_s, lambda: simulation.random.choice(clients).request(), duration_s)
        simulation.run(duration_s)
        self.goodput_per_s = self.succeeded / duration_s

    def service_s(self) -> float:
        """The next one. Refused attempts give theirs back, so that every kind of client has the same work done."""
        return self._undone_s.pop() if self._undone_s else self._draw_s()

    def was_refused(self, step: StepRecord) -> None:
        self.refused += 1
        self._undone_s.append(step.service_s)

    def _client(self, kind: str, tenant: str) -> Client:
        random = self.simulation.random.random
        if kind == "ours":
            pushback = Pushback(RetryPolicy(attempts=1 + RETRIES), ThrottlePolicy(), RetryBudget(), random)
        else:
            pushback = Pushback(RetryPolicy(attempts=1 + RETRIES if kind == "naive" else 1), None, None, random)
        return Client(self, tenant, pushback, kind == "ours")


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    found = []
    for overload in (2.0, 5.0):
        duration_s = 60.0 if quick else 180.0  # the throttle looks back two minutes
        workload = f"{overload:g}x, {RETRIES} retries a refusal"
        plain = World(stack, seed, "no retries", overload, duration_s)
        for kind in CLIENT_KINDS[:2]:
            world = World(stack, seed, kind, overload, duration_s)
            name, naive = f"{kind} clients", kind == "naive"
            found.append(Measured(name, workload, "attempts/requests", world.attempts / world.requests, 1.1, control=naive))
            goodput = world.goodput_per_s / plain.goodput_per_s
            found.append(Measured(name, workload, "goodput, of that without retries", goodput, None if naive else 0.97, at_most=False))
            found.append(Measured(name, workload, "refusals an accept", world.refused / max(1, world.succeeded)))
        capacity = plain.goodput_per_s * SERVICE_S / SLOTS
        found.append(Measured("no retries", workload, "goodput, of the capacity", capacity))
    return found


SCENARIO = Scenario("A6", "retries do not multiply an overload", run)

"""Where a run goes, with what this process knows: live workers, the catalogue, measured round trips."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway.config import Config
from gateway.core import placement
from gateway.core.routing import known_round_trips
from gateway.ports import GatewayBus
from gateway.program.bounds import scopes
from gateway.run_types import RUN_TARGET, Placement, RunOrder
from gateway.subjects import job_region
from gateway.types import Kind, Target

RUN_SCOPE = f"{Kind.RUN.value}.{RUN_TARGET}"


@dataclass(frozen=True, slots=True)
class Savings:
    """call_s(scope): round trips that each dependent call saves, seconds. once_s: the run's own way to its client and back."""

    call_s: Callable[[str], float]
    once_s: float = 0.0


NO_SAVINGS = Savings(lambda scope: 0.0)


class Placer:
    def __init__(self, config: Config, bus: GatewayBus, find_target: Callable[[Kind, str], Target | None]) -> None:
        self._config = config
        self._bus = bus
        self._find_target = find_target

    def target(self, scope: str) -> Target | None:
        kind, _, name = scope.partition(".")
        return self._find_target(Kind(kind), name)

    def place(self, order: RunOrder, silent: frozenset[str] = frozenset()) -> Placement:
        """silent: regions that do not answer now."""
        live = self._serving(silent)
        return placement.place(
            order.program,
            self._network(order, live),
            regions=self._config.region_names,
            runners=live.get(RUN_SCOPE, set()),
            origin=self._config.gateway.region,
            client_region=order.client_region,
            allowed=(order.regions,),
        )

    def allowed(self, order: RunOrder) -> tuple[str, ...]:
        """The regions that the run may be in, whoever is there now."""
        limits = [order.regions, order.program.regions]
        limits += [target.regions for scope in scopes(order.program) if (target := self.target(scope)) is not None]
        return tuple(name for name in self._config.region_names if all(name in limit for limit in limits if limit))

    def savings(self, order: RunOrder, region: str) -> "Savings":
        """What running it in `region` saves, against a client that makes each call by `Execute` at the run's origin."""
        network, origin = self._network(order, self._serving(frozenset())), job_region(order.id)
        client_s = network.to_client(origin, origin, order.client_region).seconds

        def call_s(scope: str) -> float:
            return client_s + network.call(origin, scope).seconds - network.call(region, scope).seconds

        return Savings(call_s, network.to_client(region, origin, order.client_region).seconds)

    def _network(self, order: RunOrder, live: dict[str, set[str]]) -> placement.Network:
        needed = scopes(order.program)
        targets = {scope: target for scope in needed if (target := self.target(scope)) is not None}
        trips = known_round_trips(self._bus.round_trips(), self._config.round_trips_s)
        return placement.Network(trips, targets, {scope: live.get(scope, set()) for scope in needed})

    def _serving(self, silent: frozenset[str]) -> dict[str, set[str]]:
        """The regions with live workers, by scope."""
        found: dict[str, set[str]] = {}
        for worker in self._bus.workers():
            if not worker.draining and worker.region not in silent:
                for scope in worker.targets:
                    found.setdefault(scope, set()).add(worker.region)
        return found

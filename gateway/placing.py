"""Where a run goes, with what this process knows: live workers, the catalogue, measured round trips."""

from collections.abc import Callable

from gateway.config import Config
from gateway.core import placement
from gateway.ports import GatewayBus
from gateway.program.bounds import scopes
from gateway.run_types import RUN_TARGET, Placement, RoundTrips, RunOrder
from gateway.types import Kind, Target

RUN_SCOPE = f"{Kind.RUN.value}.{RUN_TARGET}"


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
        needed = scopes(order.program)
        targets = {scope: target for scope in needed if (target := self.target(scope)) is not None}
        network = placement.Network(self._round_trips(), targets, {scope: live.get(scope, set()) for scope in needed})
        return placement.place(
            order.program,
            network,
            regions=self._config.region_names,
            runners=live.get(RUN_SCOPE, set()),
            origin=self._config.gateway.region,
            client_region=order.client_region,
            allowed=(order.regions,),
        )

    def _serving(self, silent: frozenset[str]) -> dict[str, set[str]]:
        """The regions with live workers, by scope."""
        found: dict[str, set[str]] = {}
        for worker in self._bus.workers():
            if not worker.draining and worker.region not in silent:
                for scope in worker.targets:
                    found.setdefault(scope, set()).add(worker.region)
        return found

    def _round_trips(self) -> RoundTrips:
        """What was measured, else what the configuration says."""
        measured, names = self._bus.round_trips(), self._config.region_names
        configured = {(one, two): trip for one in names for two in names if (trip := self._config.round_trip_s(one, two)) > 0}
        unmeasured = {pair: trip for pair, trip in configured.items() if measured.between(*pair) is None}
        return RoundTrips({**unmeasured, **measured.regions}, measured.targets)

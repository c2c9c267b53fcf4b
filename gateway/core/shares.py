"""Who asks for no more than an equal share of what a target gets done? Refusing these for what others send would not be fair."""

from collections import defaultdict
from collections.abc import Hashable

from gateway.types import TIERS

_WINDOW_S = 5.0
_MOST_TENANTS = 10_000  # in a window, all tiers together; beyond that nobody new is modest


class Shares:
    """Cost that came and cost that was served, by tenant and tier, in the present window and in the last whole one.

    A tenant is modest in a tier while what came from it, in either window, is no more than what the tier got served in the last one,
    divided by the tenants that sent something for it. Under max-min fairness it gets all that it asks for. Nobody is modest before a
    window is whole.
    """

    def __init__(self, window_s: float = _WINDOW_S) -> None:
        self._window_s = window_s
        self._began_s: float | None = None
        self._came: defaultdict[tuple[int, Hashable], float] = defaultdict(float)
        self._came_before: dict[tuple[int, Hashable], float] = {}
        self._served = [0.0] * TIERS
        self._shares = [0.0] * TIERS  # of one tenant, as of the last window

    def came(self, tenant: Hashable, tier: int, cost: float, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = now_s
        elif now_s - self._began_s >= self._window_s:
            self._turn(now_s)
        if len(self._came) < _MOST_TENANTS or (tier, tenant) in self._came:
            self._came[tier, tenant] += cost

    def served(self, tier: int, cost: float) -> None:
        self._served[tier] += cost

    def is_modest(self, tenant: Hashable, tier: int) -> bool:
        """To be asked after `came`."""
        now = self._came.get((tier, tenant))
        return now is not None and max(now, self._came_before.get((tier, tenant), 0.0)) <= self._shares[tier]

    def _turn(self, now_s: float) -> None:
        assert self._began_s is not None
        scale = self._window_s / (now_s - self._began_s)  # it may have been longer, when nothing came
        tenants = [0] * TIERS
        for tier, _ in self._came:
            tenants[tier] += 1
        self._shares = [scale * served / count if count else 0.0 for served, count in zip(self._served, tenants, strict=True)]
        self._came_before = {key: scale * cost for key, cost in self._came.items()}
        self._came.clear()
        self._served = [0.0] * TIERS
        self._began_s = now_s

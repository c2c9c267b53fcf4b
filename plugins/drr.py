"""Question: whose turn is it, when tenants take turns of equal cost?

Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995). At its turn a tenant may spend `quantum` times its weight, plus what it has
left over. A policy learns what a step costs only after it has picked its tenant, so a turn ends once the deficit is used up, and what was
spent too much is taken off the next ones: Surplus Round Robin (Adiseshu, Parulkar and Varghese, SIGCOMM 1996).

    turn: deficit += quantum * weight;  picked while deficit > 0;  deficit -= cost

A tenant whose deficit needs several turns to be positive again is not visited in between: the round of its next turn is computed, and the
active tenants are kept in order of (round, place in it). So a pick is O(log n) whatever the quantum.

Credit lapses when a tenant has nothing waiting, debt does not, but the rounds go on without it. While nobody waits a step that passes
takes the round with it, so that using idle capacity leaves no debt. Bound: the service of two tenants that wait all the time differs by
at most 2 * (quantum + L + c * D), with L, c and D as for `vtc`. State: one record for each active tenant and at most `max_idle` others, the
least recently charged one dropped; a dropped tenant begins at the present round.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from gateway import Flow, PolicyType, Slot, hookimpl
from gateway.core.keyed_heap import KeyedHeap


@dataclass(frozen=True)
class DrrConfig:
    """quantum: cost units a turn; larger ones make longer turns. weight: turns are that much longer, `tenants` overrides it for single
    ones. max_idle: tenants that have nothing waiting and are remembered, for each target and tier."""

    quantum: float = 1.0
    weight: float = 1.0
    tenants: dict[str, float] = field(default_factory=dict)
    max_idle: int = 10_000

    def __post_init__(self) -> None:
        if self.quantum <= 0 or self.weight <= 0 or any(weight <= 0 for weight in self.tenants.values()):
            raise ValueError("quantum, weight and the weights of tenants must be positive")
        if self.max_idle < 1:
            raise ValueError("max_idle must be at least 1")


@dataclass(slots=True)
class _Turn:
    """deficit is positive: it is what may be spent in the round `round`."""

    deficit: float
    round: int


class Drr:
    def __init__(self, config: DrrConfig) -> None:
        self._config = config
        self._turns: dict[Hashable, _Turn] = {}  # of active tenants
        self._idle: OrderedDict[Hashable, _Turn] = OrderedDict()
        self._order = KeyedHeap()  # active tenants by (round, place)
        self._places = 0
        self._round = 0  # the present one

    def reconfigure(self, config: DrrConfig) -> None:
        self._config = config
        self._bound()

    def key(self, flow: Flow) -> Hashable:
        return flow.tenant

    def activate(self, key: Hashable, flow: Flow, now_s: float) -> None:
        turn = self._idle.pop(key, None)
        if turn is None or turn.round <= self._round:
            allowance = self._allowance(flow.tenant)
            turn = _Turn(min(turn.deficit, allowance) if turn and turn.round == self._round else allowance, self._round)
        self._turns[key] = turn
        self._join(key, turn)

    def deactivate(self, key: Hashable, now_s: float) -> None:
        turn = self._turns.pop(key, None)
        if turn is not None:
            self._order.remove(key)
            self._remember(key, turn)

    def pick(self, now_s: float) -> Hashable:
        key, (of_round, _) = self._order.first()
        self._round = max(self._round, int(of_round))
        return key

    def charge(self, key: Hashable, flow: Flow, cost: float, now_s: float) -> None:
        allowance = self._allowance(flow.tenant)
        turn = self._turns.get(key)
        if turn is not None:
            if self._spend(turn, cost, allowance):
                self._join(key, turn)
            return
        turn = self._idle.pop(key, None) or _Turn(allowance, self._round)
        if turn.round < self._round:
            turn = _Turn(allowance, self._round)
        self._spend(turn, cost, allowance)
        if not self._turns:
            self._round = max(self._round, turn.round)
        self._remember(key, turn)

    def _spend(self, turn: _Turn, cost: float, allowance: float) -> bool:
        """Whether its next turn is in another round now."""
        turn.deficit -= cost
        before = turn.round
        if turn.deficit <= 0:
            turns = math.floor(-turn.deficit / allowance) + 1
        else:  # a refund gives back turns that were taken off, not such of rounds gone by
            turns = -min(math.ceil(turn.deficit / allowance) - 1, max(turn.round - self._round, 0))
        turn.deficit += turns * allowance
        turn.round += turns
        return turn.round != before

    def _join(self, key: Hashable, turn: _Turn) -> None:
        self._places += 1
        self._order.set(key, (turn.round, self._places))

    def _allowance(self, tenant: str) -> float:
        return self._config.quantum * self._config.tenants.get(tenant, self._config.weight)

    def _remember(self, key: Hashable, turn: _Turn) -> None:
        self._idle[key] = turn
        self._bound()

    def _bound(self) -> None:
        while len(self._idle) > self._config.max_idle:
            self._idle.popitem(last=False)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("drr", Slot.FAIRNESS, DrrConfig, Drr, "tenants take turns of equal cost: deficit round robin")]

"""A step's place at the gate of its target: waiting, granted or refused."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from gateway.core.admission import Refusal, Reservations
from gateway.types import Flow


@dataclass(slots=True, eq=False)
class Permit:
    """`wake` is called, once, when a permit that waits is granted or refused; set it while `is_waiting` is true."""

    flow: Flow
    arrived_s: float
    reserved: Reservations = field(default_factory=Reservations)
    is_waiting: bool = False
    refusal: Refusal | None = None
    give_up_s: float = float("inf")  # until when it may wait
    granted_s: float = 0.0
    inflight: int = 0  # of its scope when it was granted, itself included
    wake: Callable[[], None] = lambda: None
    key: Hashable = None  # of the fairness policy

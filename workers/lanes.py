"""The queues of one target in a worker: which steps are in work, which wait for a slot, how many more are asked for."""

from collections import deque
from collections.abc import Callable

from gateway.ports import Puller, Queue
from gateway.types import LANES
from workers.credits import QueueLoad, plan
from workers.held import Held


class Lane:
    """One queue: its puller while it is open, and what came from it."""

    __slots__ = ("in_hand", "pending", "puller", "queue", "recent", "waiting", "wanted")

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.puller: Puller | None = None
        self.in_hand = 0  # in work or waiting here
        self.recent = 0  # the largest in_hand lately
        self.pending = 0  # waiting at the server behind the last message
        self.waiting: deque[Held] = deque()
        self.wanted = 0


def _credit_order(lane: Lane) -> tuple[int, int]:
    return lane.queue.priority, LANES.index(lane.queue.lane)


def _start_order(lane: Lane) -> tuple[int, int]:
    return LANES.index(lane.queue.lane), lane.queue.priority


class TargetLanes:
    """Slots and queues of a target. `start(held)` begins a step; the owner says `finished` when it is over.

    Synchronous: what needs the transport (opening and closing pullers) is the owner's.
    """

    def __init__(self, slots: int, queues: list[Queue], start: Callable[[Held], None]) -> None:
        self.slots = slots
        self.running = 0
        self.waiting = 0
        self.is_open = False  # pull only while open
        self._start = start
        lanes = [Lane(queue) for queue in queues]
        self._by_credit = sorted(lanes, key=_credit_order)
        self._by_start = sorted(lanes, key=_start_order)

    @property
    def lanes(self) -> list[Lane]:
        return self._by_credit

    def offer(self, held: Held) -> None:
        """A step has come: it starts now or waits for a slot."""
        lane = held.lane
        lane.in_hand += 1
        lane.recent = max(lane.recent, lane.in_hand)
        lane.pending = held.delivery.pending
        held.found_full = 4 * (self.running + 1) >= 3 * self.slots
        if self.running < self.slots:
            self.running += 1
            self._start(held)
        else:
            lane.waiting.append(held)
            self.waiting += 1

    def finished(self, held: Held) -> None:
        """A started step is over: its slot goes to the first that waits."""
        lane = held.lane
        lane.in_hand -= 1
        if not lane.in_hand and lane.puller is not None and lane.puller.credits:
            lane.pending = 0  # a credit is out and nothing came for it: others took what waited
        self.running -= 1
        if self.waiting and self.running < self.slots:
            first = next(lane for lane in self._by_start if lane.waiting)
            self.waiting -= 1
            self.running += 1
            self._start(first.waiting.popleft())

    def start_now(self, held: Held) -> None:
        """Starts a step that waits, whatever the slots; does nothing for another one."""
        lane = held.lane
        if held in lane.waiting:
            lane.waiting.remove(held)
            self.waiting -= 1
            self.running += 1
            self._start(held)

    def withdraw_all(self) -> list[Held]:
        """Takes out all that wait."""
        withdrawn = [held for lane in self._by_start for held in lane.waiting]
        for lane in self._by_credit:
            lane.in_hand -= len(lane.waiting)
            lane.waiting.clear()
        self.waiting = 0
        return withdrawn

    def cool_down(self) -> None:
        """Called a few times a second: what was in hand at once is half forgotten each time."""
        for lane in self._by_credit:
            lane.recent = max(lane.in_hand, lane.recent // 2)

    def ask(self) -> None:
        """Asks for what the free slots allow."""
        if not self.is_open:
            return
        loads = [QueueLoad(lane.puller.credits if lane.puller is not None else 0, lane.recent, lane.pending) for lane in self._by_credit]
        planned = plan(self.slots - self.running - self.waiting, loads)
        for lane, load, credits in zip(self._by_credit, loads, planned, strict=True):
            if lane.puller is not None and (credits != lane.wanted or credits > load.outstanding):
                lane.wanted = credits
                lane.puller.want(credits)  # renewed inside until it is told otherwise, so it must also hear of less

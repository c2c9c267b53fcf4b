"""The steps that wait for a model which the worker batches for, and which of them are executed next. Pure: time is an argument, in seconds.

At most `instances` executions are in work; the rest waits here, which is what keeps batches full. Steps with the same key can be executed
together, up to max_size rows of the batch dimension; within a key they go in the order in which they came, among keys the one whose
oldest step has waited longest is looked at first. What could fill no batch any further goes without asking the policy: a full batch, one
with a step whose time is over, and one that nothing can join since all slots of the target are taken.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from gateway.core.containment import Containment, a_time
from gateway.core.estimators import Rate
from gateway.policy import BatchView, Named

LEAST_WAIT_S = 0.001  # an event loop's timers are no finer, and a policy that asks for less would keep it busy
MOST_RATES = 32  # keys whose arrival rate is kept; the least recently used one is forgotten

T = TypeVar("T")


class Entry(Generic[T]):
    """A step that waits."""

    __slots__ = ("arrived_s", "deadline_s", "item", "key", "rows")

    def __init__(self, item: T, key: Hashable, rows: int, arrived_s: float, deadline_s: float) -> None:
        self.item = item
        self.key = key
        self.rows = rows
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s


class Execution(Generic[T]):
    """Steps that are executed together; size is the sum of their rows."""

    __slots__ = ("entries", "sent_s", "size")

    def __init__(self, entries: list[Entry[T]], size: int, sent_s: float) -> None:
        self.entries = entries
        self.size = size
        self.sent_s = sent_s


class BatchQueue(Generic[T]):
    """`add` and `remove` steps, `take` executions as long as there are any, `ended` for each."""

    def __init__(self, named: Named, contain: Containment, *, instances: int, max_size: int, slots: int) -> None:
        """slots is how many steps the worker takes for the model at once, waiting and executing ones together."""
        self.configure(named, instances=instances, max_size=max_size, slots=slots)
        self._contain = contain
        self._groups: dict[Hashable, deque[Entry[T]]] = {}
        self._rates: OrderedDict[Hashable, Rate] = OrderedDict()
        self._running = 0  # executions
        self._executing = 0  # steps in them
        self.waiting = 0
        self.again_s = float("inf")  # after a `take` without result: when to try again if nothing happens before

    def configure(self, named: Named, *, instances: int, max_size: int, slots: int) -> None:
        """The model was loaded again, and may have other sizes."""
        self._named = named
        self.instances = instances
        self.max_size = max_size
        self.slots = slots

    def add(self, item: T, key: Hashable, rows: int, now_s: float, deadline_s: float) -> Entry[T]:
        entry = Entry(item, key, rows, now_s, deadline_s)
        self._groups.setdefault(key, deque()).append(entry)
        self.waiting += 1
        rate = self._rates.get(key)
        if rate is None:
            rate = self._rates[key] = Rate()
            if len(self._rates) > MOST_RATES:
                self._rates.popitem(last=False)
        else:
            self._rates.move_to_end(key)
        rate.add(now_s, rows)
        return entry

    def remove(self, entry: Entry[T]) -> bool:
        """The step was cancelled. False when it does not wait any more."""
        group = self._groups.get(entry.key)
        if group is None or entry not in group:
            return False
        group.remove(entry)
        self._drop(entry.key, group, 1)
        return True

    def take(self, now_s: float) -> Execution[T] | None:
        """The next execution to start now, if there is one."""
        self.again_s = float("inf")
        if not self.waiting or self._running >= self.instances:
            return None
        groups = list(self._groups.items())
        if len(groups) > 1:
            groups.sort(key=lambda item: item[1][0].arrived_s)
        for key, group in groups:
            count, rows = self._fitting(group)
            wait_s = self._wait_s(key, group, count, rows, now_s)
            if wait_s > 0.0:
                self.again_s = min(self.again_s, now_s + wait_s)
                continue
            entries = [group.popleft() for _ in range(count)]
            self._drop(key, group, count)
            self._running += 1
            self._executing += count
            return Execution(entries, rows, now_s)
        return None

    def ended(self, execution: Execution[T], now_s: float, *, sample: bool) -> None:
        """sample: its time tells what a batch of its size costs, so the policy hears of it."""
        self._running -= 1
        self._executing -= len(execution.entries)
        if sample:
            self._contain.call(self._named, "on_batch", None, None, execution.size, now_s - execution.sent_s, now_s)

    def _fitting(self, group: deque[Entry[T]]) -> tuple[int, int]:
        """How many steps from the front make a batch, and their rows. At least one: Triton says what it thinks of too many rows."""
        count = rows = 0
        for entry in group:
            if count and rows + entry.rows > self.max_size:
                break
            count += 1
            rows += entry.rows
        return count, rows

    def _wait_s(self, key: Hashable, group: deque[Entry[T]], count: int, rows: int, now_s: float) -> float:
        """0 to go now, else until when nobody need look; never beyond the first deadline."""
        if count < len(group) or rows >= self.max_size or self.waiting + self._executing >= self.slots:
            return 0.0
        slack_s = min(entry.deadline_s for entry in group) - now_s
        if slack_s <= 0.0:
            return 0.0
        rate = self._rates.get(key)
        view = BatchView(
            rows,
            self.max_size,
            now_s - group[0].arrived_s,
            slack_s,
            self.instances - self._running,
            rate.per_s(now_s) if rate is not None else 0.0,
        )
        wait_s: float = self._contain.call(self._named, "wait_s", a_time, 0.0, view, now_s)
        # Rounded to what a timer can do, or the rest of a rounding error would be waited for.
        return min(max(wait_s, LEAST_WAIT_S), slack_s) if wait_s > LEAST_WAIT_S / 2 else 0.0

    def _drop(self, key: Hashable, group: deque[Entry[T]], count: int) -> None:
        self.waiting -= count
        if not group:
            del self._groups[key]

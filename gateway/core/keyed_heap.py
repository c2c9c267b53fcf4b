"""A priority queue of keys whose priorities change: set, remove and first in O(log n), amortised.

A binary heap of entries; an entry that was replaced or removed stays in it until it surfaces (Python's heapq documentation, "Priority Queue
Implementation Notes"). When more than half of the heap are such entries it is built anew, which bounds the memory.
"""

import heapq
from collections.abc import Hashable
from typing import Any

Priority = tuple[float, ...]
_Entry = tuple[Any, ...]  # the priority's numbers, a serial number, the key: flat, since that compares fastest


class KeyedHeap:
    """The smallest priority is first; equal ones in the order in which they were set. All priorities are of one length."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._live: dict[Hashable, _Entry] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._live

    def set(self, key: Hashable, priority: Priority) -> None:
        """Adds the key, or gives it another priority."""
        self._serial += 1  # makes entries unique, so that keys are never compared
        entry = self._live[key] = (*priority, self._serial, key)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

    def get(self, key: Hashable) -> Priority | None:
        entry = self._live.get(key)
        return entry[:-2] if entry else None

    def remove(self, key: Hashable) -> Priority | None:
        """The priority that the key had; None when it was not there."""
        entry = self._live.pop(key, None)
        return entry[:-2] if entry else None

    def first(self) -> tuple[Hashable, Priority]:
        """Raises IndexError when empty."""
        heap, live = self._heap, self._live
        while True:
            entry = heap[0]
            if live.get(entry[-1]) is entry:
                return entry[-1], entry[:-2]
            heapq.heappop(heap)

"""Order of a step's events: they travel unstored, so they can be lost, repeated or belong to an attempt that is over."""

from gateway.types import StepEvent


class EventOrder:
    """Lets each event of the newest attempt through once, in order.

    `accept` says whether the event is new; `gap` says whether something before it was missed, so that the caller can ask for a replay.
    """

    def __init__(self, attempt: int = 0, sequence: int = 0) -> None:
        self.attempt = attempt
        self.sequence = sequence

    def gap(self, event: StepEvent) -> bool:
        """True when events before this one have not been seen."""
        if event.attempt == self.attempt:
            return event.sequence > self.sequence + 1
        return event.attempt > self.attempt and event.sequence > 1

    def accept(self, event: StepEvent) -> bool:
        """True when it is newer than everything before; it counts as seen then."""
        if (event.attempt, event.sequence) <= (self.attempt, self.sequence):
            return False
        self.attempt, self.sequence = event.attempt, event.sequence
        return True

"""Containment of policies that raise: counted, reported, answered by what the policy declared."""

from collections import Counter
from collections.abc import Callable

from gateway.policy import ADMIT, Decision, Named, OnError, Reject

FaultReport = Callable[[Named, Exception], None]


class Faults:
    """Counts faults by policy and passes them to `report`."""

    def __init__(self, report: FaultReport) -> None:
        self.counts: Counter[str] = Counter()
        self._report = report

    def note(self, named: Named, error: Exception) -> None:
        self.counts[named.name] += 1
        self._report(named, error)

    def decision(self, named: Named, error: Exception) -> Decision:
        """What to do in place of the decision that the policy failed to make."""
        self.note(named, error)
        if named.on_error is OnError.ADMIT:
            return ADMIT
        return Reject("POLICY_FAILED", f"policy {named.name} failed and is configured to reject then", scope=named.name)

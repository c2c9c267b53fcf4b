"""When does the client try again, and how long does it wait first? Pure: randomness and time come in as arguments."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import Denied, NearloopError, Rejected, Unavailable

# Reasons that say the step never reached a queue, so that sending it again cannot execute it twice.
NOT_STORED = frozenset({"NO_REGION", "NO_WORKERS", "NOT_STORED", "GATEWAY_UNREACHABLE"})

# Refusals that waiting cannot help: the step is too much for the policy at any time.
NEVER_FITS = frozenset({"COST_OVER_BURST"})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """attempts counts the first one. Without a hint the wait is random from 0 to base_s * 2**n, at most max_wait_s (full jitter:
    M. Brooker, "Exponential Backoff And Jitter", 2015). A hint is the least wait; up to `spread` of it is added at random."""

    attempts: int = 5
    base_s: float = 0.1
    max_wait_s: float = 5.0
    spread: float = 0.25

    def wait_s(self, failures: int, error: NearloopError, random: Callable[[], float]) -> float:
        """Seconds to wait after the failures-th failure, from 1."""
        ceiling_s = min(self.max_wait_s, self.base_s * 2.0 ** min(failures - 1, 30))
        if error.retry_after_s is None:
            return random() * ceiling_s
        return error.retry_after_s + random() * max(self.base_s, self.spread * error.retry_after_s)


def may_retry(error: NearloopError, repeatable: bool) -> bool:
    """A refusal is always safe to repeat, though not always of use; a lost connection only when the call is repeatable or is known not
    to be stored."""
    if isinstance(error, Rejected):
        return not isinstance(error, Denied) and error.reason not in NEVER_FITS
    return isinstance(error, Unavailable) and (repeatable or error.reason in NOT_STORED)


class RetryBudget:
    """Bounds retries to a share of the calls, so that clients do not multiply an overload (gRPC A6, retry throttling).

    A bucket of tokens: each call adds `ratio`, each retry takes one, none is done without one.
    """

    def __init__(self, ratio: float = 0.1, max_tokens: float = 10.0) -> None:
        self._ratio = ratio
        self._max_tokens = max_tokens
        self._tokens = max_tokens

    def called(self) -> None:
        self._tokens = min(self._max_tokens, self._tokens + self._ratio)

    def take(self) -> bool:
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

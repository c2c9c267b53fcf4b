"""What a client does about refusals: send this, try it again, when, or give up. One object for a client; pure.

The retry policy says how long to wait, the budget how many retries there may be, the throttle whether anything is sent at all.
"""

from collections.abc import Callable

from gateway.client_retry import RetryBudget, RetryPolicy, may_retry
from gateway.client_throttle import ClientThrottle, ThrottlePolicy, is_accept
from gateway.errors import NearloopError


class Pushback:
    """throttle None: everything may be sent. budget None: a retry for each refusal. scope is what the throttle goes by, normally the
    target; empty: it does not apply. random gives numbers from 0 to below 1."""

    def __init__(
        self, retries: RetryPolicy, throttle: ThrottlePolicy | None, budget: RetryBudget | None, random: Callable[[], float]
    ) -> None:
        self.retries = retries
        self._throttle = ClientThrottle(throttle) if throttle else None
        self._budget = budget
        self._random = random

    def begins(self, scope: str, now_s: float) -> bool:
        """May a call be made?"""
        if not self.lets(scope, now_s):
            return False
        if self._budget:
            self._budget.called()
        return True

    def answered(self, scope: str, error: NearloopError | None, now_s: float) -> None:
        """An attempt was answered. One that reached nobody, or that the caller withdrew, has no answer."""
        if scope and self._throttle:
            self._throttle.answered(scope, is_accept(error), now_s)

    def wait_s(self, error: NearloopError, failures: int, repeatable: bool, left_s: float) -> float | None:
        """Seconds to wait before the next attempt, after the failures-th one failed, from 1; `lets` is asked again then. None: no more is
        sensible, since it is not safe, or out of attempts, of time or of budget."""
        if not may_retry(error, repeatable) or failures >= self.retries.attempts:
            return None
        wait_s = self.retries.wait_s(failures, error, self._random)
        if wait_s >= left_s or (self._budget and not self._budget.take()):
            return None
        return wait_s

    def lets(self, scope: str, now_s: float) -> bool:
        """May an attempt be sent?"""
        return not scope or self._throttle is None or self._throttle.lets(scope, now_s, self._random())

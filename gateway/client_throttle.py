"""Does the client send this at all? Under a long overload it refuses a part itself, so that the gateways need not.

The client request throttle of "Site Reliability Engineering" (Beyer et al. 2016, chapter "Handling Overload"): in a window of two minutes

    p = max(0, (requests - K * accepts) / (requests + 1))

is the probability of refusing a request locally; requests are those that the application made, refused ones included. With K = 2 about
one refusal reaches the gateways for each request that they accept. Pure: time and randomness are arguments.

Three things the formula leaves open. A client that has asked for little cannot tell overload from bad luck: nothing is refused before
`evidence` requests. The last share, 1 - `most`, is always sent (the admission control of Envoy keeps a share too), or a client whose
window holds no accept at all would hardly notice the end. And when `evidence` answers in a row were accepted the overload is over: the
window is forgotten, instead of refusing for another two minutes.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass

from gateway.client_retry import NEVER_FITS
from gateway.errors import Denied, NearloopError, Rejected, Unavailable

BUCKETS = 24
MAX_SCOPES = 1000


@dataclass(frozen=True, slots=True)
class ThrottlePolicy:
    """k: requests sent for each accepted one, at least 1. window_s: how far back it looks. most: largest probability of refusing."""

    k: float = 2.0
    window_s: float = 120.0
    evidence: int = 20
    most: float = 0.9

    def __post_init__(self) -> None:
        if self.k < 1 or self.window_s <= 0 or self.evidence < 1 or not 0 <= self.most <= 1:
            raise ValueError("k and evidence must be at least 1, window_s positive, most from 0 to 1")


def is_accept(error: NearloopError | None) -> bool:
    """Was it taken in, whatever became of it? Refused for load, or by a part that is not there, is no; a refusal that has nothing to do
    with load says nothing against the next request."""
    if isinstance(error, Rejected):
        return isinstance(error, Denied) or error.reason in NEVER_FITS
    return not isinstance(error, Unavailable)


class ClientThrottle:
    """One window for each scope (target), the least recently used one dropped."""

    def __init__(self, policy: ThrottlePolicy) -> None:
        self._policy = policy
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    def probability(self, scope: str, now_s: float) -> float:
        """Of refusing the next request."""
        window, policy = self._window(scope, now_s), self._policy
        if window.requests < policy.evidence:
            return 0.0
        return min(policy.most, max(0.0, (window.requests - policy.k * window.accepts) / (window.requests + 1)))

    def lets(self, scope: str, now_s: float, random: float) -> bool:
        """May a request be sent? When not it is counted; when it may, `answered` counts it. 0 <= random < 1."""
        if random >= self.probability(scope, now_s):
            return True
        self._windows[scope].add(False)
        return False

    def answered(self, scope: str, accepted: bool, now_s: float) -> None:
        """For each request that was sent and answered. One that never left, or that the caller withdrew, says nothing."""
        window = self._window(scope, now_s)
        window.add(accepted)
        window.in_a_row = window.in_a_row + 1 if accepted else 0
        if window.in_a_row >= self._policy.evidence:
            window.forget_refusals()

    def _window(self, scope: str, now_s: float) -> "_Window":
        window = self._windows.get(scope)
        if window is None:
            window = self._windows[scope] = _Window(self._policy.window_s / BUCKETS)
            if len(self._windows) > MAX_SCOPES:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(scope)
        window.move_to(now_s)
        return window


class _Window:
    """Requests and accepts of the last BUCKETS buckets."""

    __slots__ = ("_bucket_s", "_buckets", "accepts", "in_a_row", "requests")

    def __init__(self, bucket_s: float) -> None:
        self.requests = self.accepts = 0
        self.in_a_row = 0  # accepts since the last refusal by a gateway
        self._bucket_s = bucket_s
        self._buckets: deque[list[int]] = deque()  # number, requests, accepts

    def move_to(self, now_s: float) -> None:
        number = int(now_s // self._bucket_s)
        while self._buckets and self._buckets[0][0] <= number - BUCKETS:
            _, requests, accepts = self._buckets.popleft()
            self.requests -= requests
            self.accepts -= accepts
        if not self._buckets or self._buckets[-1][0] < number:
            self._buckets.append([number, 0, 0])

    def add(self, accepted: bool) -> None:
        """Into the bucket of the last `move_to`."""
        bucket = self._buckets[-1]
        bucket[1] += 1
        bucket[2] += accepted
        self.requests += 1
        self.accepts += accepted

    def forget_refusals(self) -> None:
        for bucket in self._buckets:
            bucket[1] = bucket[2]
        self.requests = self.accepts

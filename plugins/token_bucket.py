"""Question: does this tenant ask for more than its rate?

Token buckets (Turner 1986; RFC 2697 without colours), two for each tenant: one in cost units, of which a step takes `Flow.cost`, and one in
requests, of which it takes 1 (off while `requests_per_s` is 0). A bucket holds up to its burst and gains its rate a second. A step needs
both, and takes from both or from none; the hint is when the later one has enough. State: the buckets of a tenant, the least recently used
one dropped beyond `max_tenants`; a dropped tenant starts with full buckets again. A step that costs more than a whole burst is refused with
COST_OVER_BURST and no hint: it can never pass, and clients do not try it again.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway import ADMIT, Decision, Flow, PolicyType, Reject, Sample, ScopeView, Slot, hookimpl


@dataclass(frozen=True)
class TokenBucketConfig:
    """rate_per_s and burst are in cost units, requests_per_s and request_burst in steps; `tenants` overrides rate_per_s of single tenants,
    `tenant_requests` their requests_per_s, 0 for no limit."""

    rate_per_s: float = 5000.0
    burst: float = 10_000.0
    tenants: dict[str, float] = field(default_factory=dict)
    requests_per_s: float = 0.0
    request_burst: float = 100.0
    tenant_requests: dict[str, float] = field(default_factory=dict)
    max_tenants: int = 10_000

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0 or self.burst <= 0 or self.max_tenants < 1 or any(rate <= 0 for rate in self.tenants.values()):
            raise ValueError("rate_per_s, burst, max_tenants and the rates of tenants must be positive")
        if self.requests_per_s < 0 or any(rate < 0 for rate in self.tenant_requests.values()):
            raise ValueError("requests_per_s and the rates of tenant_requests must not be negative")
        if self.request_burst < 1:
            raise ValueError("request_burst must be at least 1, or no step could pass")


@dataclass(slots=True)
class _Buckets:
    cost: float
    requests: float
    filled_s: float


class TokenBucket:
    def __init__(self, config: TokenBucketConfig) -> None:
        self._config = config
        self._buckets: OrderedDict[str, _Buckets] = OrderedDict()

    def reconfigure(self, config: TokenBucketConfig) -> None:
        """What is in a bucket stays, up to the new burst."""
        self._config = config
        while len(self._buckets) > config.max_tenants:
            self._buckets.popitem(last=False)
        for buckets in self._buckets.values():
            buckets.cost, buckets.requests = min(buckets.cost, config.burst), min(buckets.requests, config.request_burst)

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        config, tenant, cost = self._config, flow.tenant, flow.cost
        rate = config.tenants.get(tenant, config.rate_per_s) if config.tenants else config.rate_per_s
        requests = config.tenant_requests.get(tenant, config.requests_per_s) if config.tenant_requests else config.requests_per_s
        buckets = self._filled(tenant, rate, requests, now_s)
        if cost > config.burst:
            return Reject("COST_OVER_BURST", f"the step costs {cost:g}, more than a whole burst of {config.burst:g}", f"tenant:{tenant}")
        wait_s, message = 0.0, ""
        if buckets.cost < cost:
            wait_s, message = (cost - buckets.cost) / rate, f"tenant {tenant} is over {rate:g} cost units a second"
        if requests and buckets.requests < 1 and (1 - buckets.requests) / requests > wait_s:
            wait_s, message = (1 - buckets.requests) / requests, f"tenant {tenant} is over {requests:g} requests a second"
        if message:
            # Spread over another half of the wait, so that the refused do not come back all at once.
            return Reject("RATE_LIMITED", message, f"tenant:{tenant}", wait_s * (1 + random / 2))
        buckets.cost -= cost
        if requests:
            buckets.requests -= 1
        return ADMIT

    def release(self, flow: Flow, state: object, now_s: float) -> None:
        buckets = self._buckets.get(flow.tenant)
        if buckets is not None:
            buckets.cost = min(self._config.burst, buckets.cost + flow.cost)
            buckets.requests = min(self._config.request_burst, buckets.requests + 1)

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        """Tokens are spent, not borrowed."""

    def _filled(self, tenant: str, rate: float, requests: float, now_s: float) -> _Buckets:
        config, buckets = self._config, self._buckets.get(tenant)
        if buckets is None:
            buckets = self._buckets[tenant] = _Buckets(config.burst, config.request_burst, now_s)
            if len(self._buckets) > config.max_tenants:
                self._buckets.popitem(last=False)
            return buckets
        self._buckets.move_to_end(tenant)
        passed_s, buckets.filled_s = now_s - buckets.filled_s, now_s
        buckets.cost = min(config.burst, buckets.cost + passed_s * rate)
        buckets.requests = min(config.request_burst, buckets.requests + passed_s * requests)
        return buckets


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    summary = "a rate of cost units and of requests for each tenant"
    return [PolicyType("token_bucket", Slot.ADMISSION, TokenBucketConfig, TokenBucket, summary)]

"""Question: does this tenant ask for more than its rate?

A token bucket for each tenant (Turner 1986; RFC 2697 without colours): it holds up to `burst` tokens, gains `rate_per_s` a second, and a
step costs `Flow.cost` of them. State: one bucket a tenant, the least recently used one dropped beyond `max_tenants`; a dropped tenant
starts with a full bucket again. A step that costs more than a whole burst is refused with COST_OVER_BURST and no hint: it can never pass,
and clients do not try it again.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway import ADMIT, Decision, Flow, PolicyType, Reject, Sample, ScopeView, Slot, hookimpl


@dataclass(frozen=True)
class TokenBucketConfig:
    """rate_per_s and burst are in cost units; `tenants` overrides the rate of single tenants."""

    rate_per_s: float = 5000.0
    burst: float = 10_000.0
    tenants: dict[str, float] = field(default_factory=dict)
    max_tenants: int = 10_000

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0 or self.burst <= 0 or self.max_tenants < 1 or any(rate <= 0 for rate in self.tenants.values()):
            raise ValueError("rate_per_s, burst, max_tenants and the rates of tenants must be positive")


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_s: float


class TokenBucket:
    def __init__(self, config: TokenBucketConfig) -> None:
        self._config = config
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        config = self._config
        rate = config.tenants.get(flow.tenant, config.rate_per_s) if config.tenants else config.rate_per_s
        bucket = self._buckets.get(flow.tenant)
        if bucket is None:
            bucket = self._buckets[flow.tenant] = _Bucket(config.burst, now_s)
            if len(self._buckets) > config.max_tenants:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(flow.tenant)
            bucket.tokens = min(config.burst, bucket.tokens + (now_s - bucket.filled_s) * rate)
            bucket.filled_s = now_s
        if flow.cost > config.burst:
            message = f"the step costs {flow.cost:g}, more than a whole burst of {config.burst:g}"
            return Reject("COST_OVER_BURST", message, scope=f"tenant:{flow.tenant}")
        if bucket.tokens < flow.cost:
            wait_s = (flow.cost - bucket.tokens) / rate
            # Spread over another half of the wait, so that the refused do not come back all at once.
            return Reject(
                "RATE_LIMITED",
                f"tenant {flow.tenant} is over {rate:g} cost units a second",
                f"tenant:{flow.tenant}",
                wait_s * (1 + random / 2),
            )
        bucket.tokens -= flow.cost
        return ADMIT

    def release(self, flow: Flow, state: object, now_s: float) -> None:
        bucket = self._buckets.get(flow.tenant)
        if bucket is not None:
            bucket.tokens = min(self._config.burst, bucket.tokens + flow.cost)

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        """Tokens are spent, not borrowed."""


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("token_bucket", Slot.ADMISSION, TokenBucketConfig, TokenBucket, "a rate of cost units for each tenant")]

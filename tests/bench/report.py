"""From samples to medians, ratios and verdicts, as text and as JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tests.bench.contestants import CONTESTANTS

TITLES = {contestant.name: contestant.title for contestant in CONTESTANTS}
BASELINES = {"floor-commit": "floor", "nearloop": "floor", "nearloop-bare": "floor", "nearloop-triton": "triton"}
THROUGHPUT_TARGET, LATENCY_TARGET, MEMORY_TARGET_KB, POLICIES_TARGET = 1.0, 1.2, 20.0, 0.9
LOADED, ALONE = 64, 1
NOISE = 0.1


@dataclass(frozen=True)
class Sample:
    """One contestant, one round, one number of calls in flight."""

    contestant: str
    round: int
    in_flight: int
    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]  # processor time a step, by process
    others: float  # share of the cores that other programs, the kernel and the hypervisor took meanwhile
    repeated: bool = False  # measured anew and for longer, as the first measurement failed


@dataclass(frozen=True)
class Summary:
    """Medians over the rounds; spread is (largest - smallest) / median of the throughput."""

    contestant: str
    in_flight: int
    per_s: float
    p50_ms: float
    p99_ms: float
    spread: float
    cpu_us: dict[str, float]


@dataclass(frozen=True)
class Memory:
    """Unique set size of a gateway (memory that only it uses) while `steps` are in flight, and before."""

    contestant: str
    steps: int
    before_kb: float
    during_kb: float

    @property
    def kb_per_step(self) -> float:
        return (self.during_kb - self.before_kb) / self.steps


@dataclass(frozen=True)
class Verdict:
    what: str
    value: float | None  # None: not measured
    target: str
    reached: bool | None


def summarise(samples: Iterable[Sample]) -> list[Summary]:
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.in_flight, sample.contestant), []).append(sample)
    summaries = []
    for (in_flight, contestant), group in groups.items():
        rates = [sample.per_s for sample in group]
        cpu_us = {name: median(sample.cpu_us[name] for sample in group) for name in group[0].cpu_us}
        p50_ms, p99_ms = median(sample.p50_ms for sample in group), median(sample.p99_ms for sample in group)
        spread = (max(rates) - min(rates)) / median(rates)
        summaries.append(Summary(contestant, in_flight, median(rates), p50_ms, p99_ms, spread, cpu_us))
    return summaries


def ratio(samples: Sequence[Sample], field: str, one: str, other: str, in_flight: int) -> float | None:
    """Median over the rounds of one's value / the other's; None when no round measured both."""
    values: dict[tuple[str, int], float] = {
        (sample.contestant, sample.round): getattr(sample, field) for sample in samples if sample.in_flight == in_flight
    }
    ratios = [value / values[other, number] for (name, number), value in values.items() if name == one and (other, number) in values]
    return median(ratios) if ratios else None


def verdicts(samples: Sequence[Sample], memory: Sequence[Memory]) -> list[Verdict]:
    rate, alone = (ratio(samples, field, "nearloop", "floor", many) for field, many in (("per_s", LOADED), ("p50_ms", ALONE)))
    policies = ratio(samples, "per_s", "nearloop", "nearloop-bare", LOADED)
    kb = next((item.kb_per_step for item in memory if item.contestant == "nearloop"), None)
    return [
        Verdict(
            f"throughput at {LOADED} in flight, Nearloop / floor",
            rate,
            f">= {THROUGHPUT_TARGET:.2f}",
            None if rate is None else rate >= THROUGHPUT_TARGET,
        ),
        Verdict("p50 alone, Nearloop / floor", alone, f"<= {LATENCY_TARGET:.2f}", None if alone is None else alone <= LATENCY_TARGET),
        Verdict(
            f"throughput at {LOADED} in flight, with / without policies",
            policies,
            f">= {POLICIES_TARGET:.2f}",
            None if policies is None else policies >= POLICIES_TARGET,
        ),
        Verdict("gateway memory a step in flight, KB", kb, f"<= {MEMORY_TARGET_KB:.0f}", None if kb is None else kb <= MEMORY_TARGET_KB),
    ]


def _table(samples: Sequence[Sample], in_flight: int) -> list[str]:
    lines = [
        "",
        f"{f'{in_flight} in flight':<36}{'steps/s':>8}{'spread':>8}{'p50 ms':>9}{'p99 ms':>9}  {'beside':<16}CPU us a step",
    ]
    for summary in summarise(sample for sample in samples if sample.in_flight == in_flight):
        base = BASELINES.get(summary.contestant, "")
        beside_base = ratio(samples, "per_s", summary.contestant, base, in_flight)
        beside = f"{beside_base:.2f} x {base}" if beside_base else ""
        cpu = " + ".join(f"{value:.0f} {name}" for name, value in summary.cpu_us.items())
        lines.append(
            f"{TITLES[summary.contestant]:<36}{summary.per_s:>8,.0f}{summary.spread:>8.0%}{summary.p50_ms:>9.2f}{summary.p99_ms:>9.2f}"
            f"  {beside:<16}{sum(summary.cpu_us.values()):.0f} = {cpu}"
        )
    return lines


def text(samples: Sequence[Sample], memory: Sequence[Memory], missing: dict[str, str]) -> str:
    lines: list[str] = []
    for in_flight in sorted({sample.in_flight for sample in samples}):
        lines += _table(samples, in_flight)
    if memory:
        lines += ["", f"{'memory of the gateway':<36}{'in flight':>10}{'before':>12}{'during':>12}{'a step':>10}"]
    for item in memory:
        lines.append(
            f"{TITLES[item.contestant]:<36}{item.steps:>10,}{item.before_kb:>9,.0f} KB{item.during_kb:>9,.0f} KB{item.kb_per_step:>7.1f} KB"
        )
    lines.append("")
    if samples:
        others = [sample.others for sample in samples]
        warning = ": too much to compare by" if median(others) > NOISE else ""
        lines.append(f"other programs took {median(others):.0%} of the cores meanwhile, at most {max(others):.0%}{warning}")
        repeated = [f"{sample.contestant} at {sample.in_flight}" for sample in samples if sample.repeated]
        if repeated:
            lines.append(f"{len(repeated)} of {len(samples)} measurements failed and were repeated for longer: {', '.join(repeated)}")
    for verdict in verdicts(samples, memory):
        word = {True: "reached", False: "MISSED", None: "not measured"}[verdict.reached]
        value = "" if verdict.value is None else f"{verdict.value:.2f}"
        lines.append(f"{verdict.what:<48}{value:>8}   target {verdict.target:<10}{word}")
    lines += [f"NOT MEASURED {TITLES[name]}: {why}" for name, why in missing.items()]
    return "\n".join(lines)


def document(
    machine: dict[str, str], settings: dict[str, Any], samples: Sequence[Sample], memory: Sequence[Memory], missing: dict[str, str]
) -> dict[str, Any]:
    return {
        "machine": machine,
        "settings": settings,
        "medians": [asdict(summary) for summary in summarise(samples)],
        "memory": [asdict(item) | {"kb_per_step": item.kb_per_step} for item in memory],
        "verdicts": [asdict(verdict) for verdict in verdicts(samples, memory)],
        "not_measured": missing,
        "samples": [asdict(sample) for sample in samples],
    }

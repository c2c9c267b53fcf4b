"""From samples to medians, ratios and verdicts, as text and as JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tests.bench.contestants import CONTESTANTS

TITLES = {contestant.name: contestant.title for contestant in CONTESTANTS}
BASELINES = {"floor-commit": "floor", "nearloop": "floor", "nearloop-triton": "triton"}
THROUGHPUT_TARGET, LATENCY_TARGET, MEMORY_TARGET_KB = 1.0, 1.2, 20.0
LOADED, ALONE = 64, 1


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


def find(summaries: Sequence[Summary], contestant: str, in_flight: int) -> Summary | None:
    return next((item for item in summaries if (item.contestant, item.in_flight) == (contestant, in_flight)), None)


def verdicts(summaries: Sequence[Summary], memory: Sequence[Memory]) -> list[Verdict]:
    def ratio(field: str, in_flight: int) -> float | None:
        ours, floor = find(summaries, "nearloop", in_flight), find(summaries, "floor", in_flight)
        return float(getattr(ours, field) / getattr(floor, field)) if ours and floor else None

    rate, alone = ratio("per_s", LOADED), ratio("p50_ms", ALONE)
    kb = next((item.kb_per_step for item in memory if item.contestant == "nearloop"), None)
    return [
        Verdict(
            f"throughput at {LOADED} in flight, Nearloop / floor",
            rate,
            f">= {THROUGHPUT_TARGET:.2f}",
            None if rate is None else rate >= THROUGHPUT_TARGET,
        ),
        Verdict("p50 alone, Nearloop / floor", alone, f"<= {LATENCY_TARGET:.2f}", None if alone is None else alone <= LATENCY_TARGET),
        Verdict("gateway memory a step in flight, KB", kb, f"<= {MEMORY_TARGET_KB:.0f}", None if kb is None else kb <= MEMORY_TARGET_KB),
    ]


def _table(summaries: Sequence[Summary], in_flight: int) -> list[str]:
    lines = [
        "",
        f"{f'{in_flight} in flight':<36}{'steps/s':>8}{'spread':>8}{'p50 ms':>9}{'p99 ms':>9}  {'beside':<16}CPU us a step",
    ]
    for summary in (item for item in summaries if item.in_flight == in_flight):
        base = find(summaries, BASELINES.get(summary.contestant, ""), in_flight)
        beside = f"{summary.per_s / base.per_s:.2f} x {base.contestant}" if base else ""
        cpu = " + ".join(f"{value:.0f} {name}" for name, value in summary.cpu_us.items())
        lines.append(
            f"{TITLES[summary.contestant]:<36}{summary.per_s:>8,.0f}{summary.spread:>8.0%}{summary.p50_ms:>9.2f}{summary.p99_ms:>9.2f}"
            f"  {beside:<16}{sum(summary.cpu_us.values()):.0f} = {cpu}"
        )
    return lines


def text(samples: Sequence[Sample], memory: Sequence[Memory], missing: dict[str, str]) -> str:
    summaries = summarise(samples)
    lines: list[str] = []
    for in_flight in sorted({summary.in_flight for summary in summaries}):
        lines += _table(summaries, in_flight)
    if memory:
        lines += ["", f"{'memory of the gateway':<36}{'in flight':>10}{'before':>12}{'during':>12}{'a step':>10}"]
    for item in memory:
        lines.append(
            f"{TITLES[item.contestant]:<36}{item.steps:>10,}{item.before_kb:>9,.0f} KB{item.during_kb:>9,.0f} KB{item.kb_per_step:>7.1f} KB"
        )
    lines.append("")
    for verdict in verdicts(summaries, memory):
        word = {True: "reached", False: "MISSED", None: "not measured"}[verdict.reached]
        value = "" if verdict.value is None else f"{verdict.value:.2f}"
        lines.append(f"{verdict.what:<48}{value:>8}   target {verdict.target:<10}{word}")
    lines += [f"NOT MEASURED {TITLES[name]}: {why}" for name, why in missing.items()]
    return "\n".join(lines)


def document(
    machine: dict[str, str], settings: dict[str, Any], samples: Sequence[Sample], memory: Sequence[Memory], missing: dict[str, str]
) -> dict[str, Any]:
    summaries = summarise(samples)
    return {
        "machine": machine,
        "settings": settings,
        "medians": [asdict(summary) for summary in summaries],
        "memory": [asdict(item) | {"kb_per_step": item.kb_per_step} for item in memory],
        "verdicts": [asdict(verdict) for verdict in verdicts(summaries, memory)],
        "not_measured": missing,
        "samples": [asdict(sample) for sample in samples],
    }

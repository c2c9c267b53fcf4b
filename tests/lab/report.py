"""From single seeds to a table: means, confidence intervals, verdicts."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from tests.lab.scenario import Measured

# Student's t, two-sided 95 %, by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 15: 2.13, 20: 2.09, 30: 2.04}


@dataclass(frozen=True)
class Row:
    """One line: the mean over the seeds and half the width of its 95 % confidence interval."""

    scenario: str
    policy: str
    workload: str
    what: str
    value: float
    interval: float
    seeds: int
    target: float | None
    at_most: bool
    control: bool

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return ""
        if math.isnan(self.value):
            return "NOT MEASURED"
        if self.control:
            return "CONTROL PASSED" if self.reached else "fails, as it should"
        return "reached" if self.reached else "MISSED"

    @property
    def bad(self) -> bool:
        """A target that was missed, a control that a bad policy passes, or no number: then the experiment tells nothing."""
        return self.reached is not None and (self.reached == self.control or math.isnan(self.value))


def rows(scenario: str, measured: Iterable[Measured]) -> list[Row]:
    """One for each (policy, workload, what), in the order in which they came first."""
    groups: dict[tuple[str, str, str], list[Measured]] = {}
    for one in measured:
        groups.setdefault((one.policy, one.workload, one.what), []).append(one)
    found = []
    for group in groups.values():
        values = [one.value for one in group]
        interval = _interval(values)
        first = group[0]
        found.append(
            Row(
                scenario,
                first.policy,
                first.workload,
                first.what,
                mean(values),
                interval,
                len(values),
                first.target,
                first.at_most,
                first.control,
            )
        )
    return found


def _interval(values: list[float]) -> float:
    if len(values) < 2:
        return float("nan")
    degrees = max(known for known in _T if known <= len(values) - 1)
    return _T[degrees] * stdev(values) / math.sqrt(len(values))


def text(found: list[Row]) -> str:
    titles = ("", "policy", "workload", "what", "result", "target", "verdict")
    cells = [titles, *((row.scenario, row.policy, row.workload, row.what, _result(row), _target(row), row.verdict) for row in found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def document(found: list[Row]) -> list[dict[str, Any]]:
    """For JSON, which has no nan."""
    named = [asdict(row) | {"verdict": row.verdict} for row in found]
    return [{name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()} for row in named]


def _result(row: Row) -> str:
    interval = "" if math.isnan(row.interval) else f" ± {row.interval:.2g}"
    return f"{row.value:.4g}{interval}"


def _target(row: Row) -> str:
    return "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g}"

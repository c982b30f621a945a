"""What a subcommand hands on once it has measured: a table, charts, and the raw data behind them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perf.histogram import Histogram
from perf.plots import Axis, Points, line_chart
from perf.turns import Results


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As a GitHub-flavoured table."""
        lines = (self.columns, ["---"] * len(self.columns), *self.rows)
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement in a report."""

    title: str
    note: str
    """How it was measured, in a sentence or two."""
    table: Table
    charts: Sequence[str]
    """SVG."""
    series: Mapping[str, Results] = field(default_factory=dict)
    """The turns, by what they were; a part that is not made of turns has none."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What it has instead, by name."""

    def markdown(self, run: str = "") -> str:
        """Heading, with the name of the run in a report of several, note, warnings and table."""
        return f"### {self.heading(run)}\n\n{self.note}{self.warnings()}\n\n{self.table.markdown()}"

    def heading(self, run: str) -> str:
        """The title, and which run it is of."""
        return f"{self.title} ({run})" if run else self.title

    def warnings(self) -> str:
        """What a reader must know before believing the figures; empty if there is nothing."""
        found = []
        if self.interrupted:
            found.append("Interrupted: fewer turns than asked for.")
        for results in self.series.values():
            for case, series in results.items():
                if series.failures:
                    reasons = ", ".join(f"{number} x {reason}" for reason, number in series.failures.most_common(3))
                    found.append(f"{case} failed at times: {reasons}.")
        bound = [
            str(case) for results in self.series.values() for case, series in results.items() if series.is_client_bound
        ]
        if bound:
            found.append(f"The client had no CPU to spare, so these rates are lower bounds: {', '.join(bound)}.")
        return "".join(f" **{text}**" for text in found)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C has cut it short."""
        return any(results.interrupted for results in self.series.values())

    def as_json(self) -> dict[str, object]:
        """All turns, for the raw data beside a report."""
        return {
            "title": self.title,
            "note": self.note,
            "figures": dict(self.figures),
            "turns": {
                what: {str(case): [turn.as_json() for turn in series] for case, series in results.items()}
                for what, results in self.series.items()
            },
        }


def figure(value: float, spec: str) -> str:
    """A number as `spec` wants it; a dash for one that is not known."""
    return format(value, spec) if math.isfinite(value) else "-"


def figure_and_spread(value: float, spread: tuple[float, float], spec: str) -> str:
    """A median, then in brackets least and greatest."""
    return f"{figure(value, spec)} ({figure(spread[0], spec)}-{figure(spread[1], spec)})"


def quantiles_ms(latencies: Histogram, *qs: float) -> str:
    """Quantiles in milliseconds."""
    return " / ".join(figure(latencies.quantile_s(q) * 1e3, ".1f") for q in qs)


def latency_chart(title: str, what: str, latencies: Mapping[str, Histogram]) -> str:
    """The cumulative distributions."""

    def points(histogram: Histogram) -> Points:
        return [(seconds * 1e3, 100 * seen / histogram.count) for seconds, seen in histogram.cumulative()]

    lines = {name: points(histogram) for name, histogram in latencies.items() if histogram.count}
    return line_chart(title, Axis(f"{what}, ms", logarithmic=True), Axis("% done within"), lines)


def print_parts(parts: Iterable[Part], json_path: Path | None) -> int:
    """Print the parts as Markdown, as they come, and write the raw data; return the exit code."""
    shown = []
    for part in parts:
        print(part.markdown(), flush=True)
        shown.append(part)
    if json_path is not None:
        json_path.write_text(json.dumps([part.as_json() for part in shown]) + "\n")
    return 130 if any(part.interrupted for part in shown) else 0


def run_parts(arguments: argparse.Namespace) -> int:
    """Carry out a subcommand whose module has `measure(arguments)`, which yields parts."""
    return print_parts(arguments.measure(arguments), arguments.json)

"""Tables of figures, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perf.histogram import Histogram
from perf.turns import Results


@dataclass(frozen=True, slots=True)
class Table:
    """What a report shows of one measurement."""

    title: str
    note: str
    """How it was measured, in a sentence or two."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self, level: int = 3) -> str:
        """Heading, note and table."""
        lines = [f"{'#' * level} {self.title}", "", self.note, ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (self.columns, ["---"] * len(self.columns), *self.rows)]
        return "\n".join(lines) + "\n"


def quantiles_ms(latencies: Histogram, *qs: float) -> str:
    """Quantiles in milliseconds."""
    return " / ".join(f"{latencies.quantile_s(q) * 1e3:.1f}" for q in qs)


def warnings(results: Results[str] | Results[tuple[str, float]]) -> str:
    """What a reader must know before believing the figures; empty if there is nothing."""
    found = []
    if results.interrupted:
        found.append("interrupted: fewer turns than asked for")
    for case, series in results.items():
        name = case if isinstance(case, str) else f"{case[0]} at {case[1] * 1e3:g} ms"
        if series.failures:
            reasons = ", ".join(f"{number} x {reason}" for reason, number in series.failures.most_common(3))
            found.append(f"{name}: failures ({reasons})")
        if series.is_client_bound:
            found.append(f"{name}: the client had no CPU to spare, so its rate is a lower bound")
    return "".join(f" **{text[0].upper()}{text[1:]}.**" for text in found)

"""A high dynamic range histogram: latencies from a microsecond to minutes, each told to 1.6 % or better.

Log-linear buckets, as in Gil Tene's HdrHistogram: 64 linear steps for each power of two. Recording is an integer shift
and a dict entry; histograms of several processes and turns add up without loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

_STEP_BITS = 6
_STEPS = 1 << _STEP_BITS


class Histogram:
    """Counts of durations, recorded in seconds, kept by bucket of microseconds."""

    __slots__ = ("_counts", "count", "max_s")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.max_s = 0.0

    def record(self, seconds: float) -> None:
        """Take in one duration; less than a microsecond counts as none."""
        us = int(seconds * 1e6)
        shift = max(us.bit_length() - _STEP_BITS - 1, 0)
        bucket = (shift << _STEP_BITS) + (us >> shift)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.count += 1
        self.max_s = max(self.max_s, seconds)

    def add(self, other: Histogram) -> None:
        """Take in all that another has recorded."""
        for bucket, count in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.count += other.count
        self.max_s = max(self.max_s, other.max_s)

    def quantile_s(self, q: float) -> float:
        """The duration that a part `q` of all did not exceed (nearest rank); NaN of nothing."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(q * self.count))
        return next(seconds for seconds, seen in self.cumulative() if seen >= rank)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(seconds, how many took at most that), upwards, for every bucket that has any."""
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            yield min(_highest_us(bucket) / 1e6, self.max_s), seen

    def count_above(self, seconds: float) -> int:
        """How many took longer, by bucket."""
        return self.count - max((seen for bound, seen in self.cumulative() if bound <= seconds), default=0)

    def as_json(self) -> dict[str, object]:
        """What from_json() takes."""
        return {"max_s": self.max_s, "counts": {str(bucket): self._counts[bucket] for bucket in sorted(self._counts)}}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Histogram:
        """Read back what as_json() gave. Raises KeyError, TypeError or ValueError if it is not that."""
        counts, max_s = data["counts"], data["max_s"]
        if not isinstance(counts, dict) or not isinstance(max_s, (int, float)):
            raise TypeError("expected counts by bucket and a maximum")
        histogram = cls()
        histogram._counts = {int(bucket): int(count) for bucket, count in counts.items()}
        histogram.count = sum(histogram._counts.values())
        histogram.max_s = float(max_s)
        return histogram


def _highest_us(bucket: int) -> int:
    """The first microsecond beyond the bucket."""
    shift = max((bucket >> _STEP_BITS) - 1, 0)
    return (bucket - (shift << _STEP_BITS) + 1) << shift

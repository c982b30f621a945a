"""Metrics as doubles in shared memory: every process counts in its own store, one process sums over all of them.

A store is a sealed memfd: a header, an array of float64 values, and a directory that is only ever appended to, each
record telling which slots belong to which family and label values. The writer pays one array element per count. A
process that dies loses no count: its successor opens the same memfd and goes on in the same slots.

The reader (`read_samples`) trusts nothing it finds: the families come from its own code, everything else is checked,
and it reads with pread(2), so a writer cannot make it fault.
"""

from __future__ import annotations

import enum
import fcntl
import json
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

OTHER = "_other"
"""What every label becomes once a family has `max_label_sets` of them, or the store is full."""
MAX_LABEL_LENGTH = 128

_MAGIC = b"hsmstat1"
_HEADER = struct.Struct("<8sIII")
"""Magic, number of slots, directory capacity in bytes, directory bytes in use (written last)."""
_USED_OFFSET = _HEADER.size - 4
_VALUES_OFFSET = 64
_RECORD_LENGTH = struct.Struct("<I")
_DIRECTORY_BYTES = 1 << 20
_MAX_RECORD_BYTES = 4096
_MAX_SLOTS = 1 << 20
_MAX_VALUE = float(1 << 53)
"""Beyond it a count no longer grows by one. What is below stays finite, however many are summed."""
_SCRAP_SLOTS = 64
"""The first slots take what no longer fits; they are never read."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Kind(enum.Enum):
    """The Prometheus metric types in use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Merge(enum.Enum):
    """How a gauge's values in several processes become one. Counters and histograms are always summed."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric, declared once as a module-level constant by whoever counts it."""

    name: str
    kind: Kind
    help: str
    label_names: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds (inclusive) of a histogram's buckets, rising, without +Inf."""
    merge: Merge = Merge.SUM
    max_label_sets: int = 256

    def __post_init__(self) -> None:
        if (self.kind is Kind.HISTOGRAM) != bool(self.buckets) or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"{self.name}: a histogram, and nothing else, has rising buckets")
        if self.slots > _SCRAP_SLOTS:
            raise ValueError(f"{self.name}: at most {_SCRAP_SLOTS - 2} buckets expected")

    @property
    def slots(self) -> int:
        """Slots of one label set: a histogram has one per bucket, one for +Inf and one for the sum."""
        return len(self.buckets) + 2 if self.kind is Kind.HISTOGRAM else 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One label set of one family, as read from a store.

    `values` is one number; for a histogram the count of each bucket (not cumulative), of +Inf, and then the sum.
    """

    family: Family
    labels: tuple[str, ...]
    values: tuple[float, ...]


class Histogram:
    """One label set of a histogram."""

    __slots__ = ("_bounds", "_first", "_sum", "_values")

    def __init__(self, values: memoryview[float], first: int, bounds: Sequence[float]) -> None:
        self._values = values
        self._first = first
        self._bounds = bounds
        self._sum = first + len(bounds) + 1

    def observe(self, value: float) -> None:
        """Count `value`, in the family's unit."""
        values = self._values
        values[self._first + bisect_left(self._bounds, value)] += 1.0
        values[self._sum] += value


class MetricStore:
    """The writer's side of one store. It belongs to one thread: `values[slot] += 1.0` is not atomic.

    Where several threads count, each counts in plain integers of its own and one adds them here.
    """

    def __init__(self, fd: int | None = None, *, slots: int = 16384) -> None:
        """Make a store of `slots` values, or go on with the one behind `fd` (which is then owned by this object).

        Gauges of a store that is gone on with are set to 0; what a damaged store held is lost.

        Raises ValueError if `fd` is no store.
        """
        self.fd = create_store(slots) if fd is None else fd
        """The memfd: give it to a child or to `read_samples`."""
        geometry = _read_geometry(self.fd)
        if geometry is None:
            raise ValueError(f"file descriptor {fd} is not a metric store")
        self._slots = geometry.slots
        self._directory_offset = geometry.directory_offset
        self._directory_end = geometry.directory_offset + geometry.directory_bytes
        self._map = mmap.mmap(self.fd, self._directory_end)
        with memoryview(self._map) as whole:
            self.values: memoryview[float] = whole[_VALUES_OFFSET : self._directory_offset].cast("d")
        """The slots: `store.values[slot] += 1.0` is the hot path."""
        self._used = 0
        self._next_slot = _SCRAP_SLOTS
        self._known: dict[tuple[str, tuple[str, ...]], int] = {}
        self._label_sets: dict[str, int] = {}
        if not self._replay(geometry.used):
            self._reset()

    def counter(self, family: Family, labels: tuple[str, ...] = ()) -> int:
        """Return the slot of a counter: add to `values[slot]`."""
        _expect(family, Kind.COUNTER)
        return self._slot(family, labels)

    def gauge(self, family: Family, labels: tuple[str, ...] = ()) -> int:
        """Return the slot of a gauge: set or add to `values[slot]`. It starts from 0 in every process."""
        _expect(family, Kind.GAUGE)
        return self._slot(family, labels)

    def histogram(self, family: Family, labels: tuple[str, ...] = ()) -> Histogram:
        """Return one label set of a histogram."""
        _expect(family, Kind.HISTOGRAM)
        return Histogram(self.values, self._slot(family, labels), family.buckets)

    def add(self, sample: Sample) -> None:
        """Add what another store has counted; a gauge, which tells of the present, is left out."""
        if sample.family.kind is not Kind.GAUGE:
            first = self._slot(sample.family, sample.labels)
            for slot, value in enumerate(sample.values, first):
                self.values[slot] += value

    def close(self) -> None:
        """Unmap the store and close its memfd. Any slot or Histogram handed out is dead from then on."""
        self.values.release()
        self._map.close()
        os.close(self.fd)

    def _slot(self, family: Family, labels: tuple[str, ...]) -> int:
        slot = self._known.get((family.name, labels))
        if slot is not None:
            return slot
        if len(labels) != len(family.label_names):
            raise ValueError(f"{family.name} has labels {family.label_names}; {len(labels)} values given")
        folded = (OTHER,) * len(labels)
        if labels != folded and self._label_sets.get(family.name, 0) >= family.max_label_sets:
            return self._slot(family, folded)
        if not all(_is_label(label) for label in labels):
            return self._slot(family, folded)
        return self._append(family, labels)

    def _append(self, family: Family, labels: tuple[str, ...]) -> int:
        body = json.dumps(
            [family.name, labels, self._next_slot, family.slots, family.kind.value], ensure_ascii=False
        ).encode()
        start = self._directory_offset + self._used
        end = start + _RECORD_LENGTH.size + len(body)
        if end > self._directory_end or self._next_slot + family.slots > self._slots or len(body) > _MAX_RECORD_BYTES:
            return 0
        slot = self._next_slot
        self._map[start:end] = _RECORD_LENGTH.pack(len(body)) + body
        self._used = end - self._directory_offset
        self._map[_USED_OFFSET : _HEADER.size] = struct.pack("<I", self._used)
        self._remember(family.name, labels, slot, family.slots)
        return slot

    def _remember(self, name: str, labels: tuple[str, ...], slot: int, count: int) -> None:
        self._known[name, labels] = slot
        self._label_sets[name] = self._label_sets.get(name, 0) + 1
        self._next_slot = slot + count

    def _replay(self, used: int) -> bool:
        """Take over what an earlier writer registered; False if that is not what this class writes."""
        directory = self._map[self._directory_offset : self._directory_offset + used]
        for record in _records(directory):
            if record.slot != self._next_slot or not 1 <= record.count <= _SCRAP_SLOTS:
                return False
            if record.slot + record.count > self._slots:
                return False
            self._remember(record.name, record.labels, record.slot, record.count)
            if record.kind == Kind.GAUGE.value:
                self.values[record.slot] = 0.0
            self._used = record.end
        return self._used == used

    def _reset(self) -> None:
        self._known.clear()
        self._label_sets.clear()
        self._used = 0
        self._next_slot = _SCRAP_SLOTS
        self._map[_USED_OFFSET : _HEADER.size] = bytes(4)
        self._map[_VALUES_OFFSET : self._directory_offset] = bytes(self._slots * 8)


def create_store(slots: int = 16384) -> int:
    """Return a new memfd with an empty store in it; its size can no longer be changed by anyone who holds it."""
    if not _SCRAP_SLOTS < slots <= _MAX_SLOTS:
        raise ValueError(f"{slots} slots; {_SCRAP_SLOTS + 1} to {_MAX_SLOTS} expected")
    fd = os.memfd_create("hsm-metrics", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _VALUES_OFFSET + slots * 8 + _DIRECTORY_BYTES)
    os.pwrite(fd, _HEADER.pack(_MAGIC, slots, _DIRECTORY_BYTES, 0), 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def read_samples(fd: int, families: Mapping[str, Family]) -> list[Sample]:
    """Return what a process has counted in the store behind `fd`, as far as it belongs to `families` (by name).

    A writer gone bad costs its own samples at most: what makes no sense is left out, without an error.
    """
    geometry = _read_geometry(fd)
    if geometry is None:
        return []
    values = memoryview(os.pread(fd, geometry.slots * 8, _VALUES_OFFSET)).cast("d")
    seen: dict[tuple[str, tuple[str, ...]], Sample] = {}
    label_sets: dict[str, int] = {}
    for record in _records(os.pread(fd, geometry.used, geometry.directory_offset)):
        family = families.get(record.name)
        if family is None or record.count != family.slots or len(record.labels) != len(family.label_names):
            continue
        if record.slot < _SCRAP_SLOTS or record.slot + record.count > len(values):
            continue
        if (record.name, record.labels) in seen or label_sets.get(record.name, 0) > family.max_label_sets:
            continue
        numbers = tuple(values[record.slot : record.slot + record.count])
        if _are_plausible(numbers) and (family.kind is Kind.GAUGE or min(numbers) >= 0):
            seen[record.name, record.labels] = Sample(family, record.labels, numbers)
            label_sets[record.name] = label_sets.get(record.name, 0) + 1
    return list(seen.values())


@dataclass(frozen=True, slots=True)
class _Geometry:
    slots: int
    directory_bytes: int
    used: int

    @property
    def directory_offset(self) -> int:
        return _VALUES_OFFSET + self.slots * 8


@dataclass(frozen=True, slots=True)
class _Record:
    name: str
    labels: tuple[str, ...]
    slot: int
    count: int
    kind: str
    end: int


def _read_geometry(fd: int) -> _Geometry | None:
    try:
        header = os.pread(fd, _HEADER.size, 0)
        size = os.fstat(fd).st_size
    except OSError:
        return None
    if len(header) != _HEADER.size:
        return None
    magic, slots, directory_bytes, used = _HEADER.unpack(header)
    geometry = _Geometry(slots, directory_bytes, used)
    sound = (
        magic == _MAGIC
        and _SCRAP_SLOTS < slots <= _MAX_SLOTS
        and directory_bytes == _DIRECTORY_BYTES
        and used <= directory_bytes
        and geometry.directory_offset + directory_bytes == size
    )
    return geometry if sound else None


def _records(directory: bytes) -> Iterator[_Record]:
    """Yield the records up to the first that is not one."""
    offset = 0
    while offset + _RECORD_LENGTH.size <= len(directory):
        (length,) = _RECORD_LENGTH.unpack_from(directory, offset)
        start = offset + _RECORD_LENGTH.size
        offset = start + length
        if length > _MAX_RECORD_BYTES or offset > len(directory):
            return
        try:
            name, labels, slot, count, kind = json.loads(directory[start:offset])
        except (ValueError, TypeError, RecursionError):
            return
        if not (isinstance(name, str) and isinstance(kind, str) and isinstance(labels, list)):
            return
        if not (type(slot) is int and type(count) is int):
            return
        if not all(isinstance(label, str) and _is_label(label) for label in labels):
            return
        yield _Record(name, tuple(labels), slot, count, kind, offset)


def _are_plausible(numbers: tuple[float, ...]) -> bool:
    return all(-_MAX_VALUE <= number <= _MAX_VALUE for number in numbers)


def _is_label(label: str) -> bool:
    return len(label) <= MAX_LABEL_LENGTH and (label == "" or label.isprintable())


def _expect(family: Family, kind: Kind) -> None:
    if family.kind is not kind:
        raise ValueError(f"{family.name} is a {family.kind.value}, not a {kind.value}")

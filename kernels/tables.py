"""Launch configurations measured offline, one JSON file a GPU, read and never written at run time.

    entries[activation bits, weight bits, group, N, K, bucket(M)] = route and its configuration
    bucket(M) = the least of 1, 2, 4, ... 2048 that is at least M, else 2048

A shape that was not measured takes the entry of the same activations, group and bucket whose width
is nearest from above, and among those the one whose N*K is nearest as a ratio, up to 16 times; what
shared memory has no room for is cut at the launch (`kernels.shared_memory`). Where there is
none, and on a GPU that was never measured and for which none stands in, there is no answer: the
kernel's own default holds. Activations of 2..7 bits run the kernels of 8, so `a8` answers for them,
unless an entry of their own and of exactly that weight width says that a narrower route is faster.

Shape legend: M tokens, N outputs, K inputs.
"""

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

__all__ = [
    "BUCKETS",
    "CONFIGS",
    "GROUPS",
    "WHOLE_ROW",
    "ConfigTable",
    "InvalidTableError",
    "Route",
    "TableEntry",
    "TableKey",
    "find_table",
    "load_table",
    "read_record",
    "read_table",
    "table_path",
    "write_record",
    "write_table",
]

T = TypeVar("T")
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CONFIGS = Path(__file__).parent / "configs"
WHOLE_ROW = -1
GROUPS = (WHOLE_ROW, 32, 64, 128)
STANDS_IN = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}
"""For a GPU that was not measured one that has as many multiprocessors of the same kind."""
MOST_TIMES = 16
"""What was measured of one weight says nothing of one that is so many times smaller or larger."""
BYTE_BITS = 8
HALF_BITS = 16
KEY = re.compile(r"a(\d+) w(\d+) g(-1|\d+) (\d+)x(\d+) m(\d+)")
FIELDS = {"gpu", "source", "entries"}
ENTRY_FIELDS = {"route", "us", "config"}


class InvalidTableError(ValueError):
    """A table names what no kernel has."""


class Route(StrEnum):
    """The kernel that answers."""

    DECODE = "decode"
    """`kernels.decode_linear`: dp4a, a few tokens."""
    TILE = "tile"
    """`kernels.tile_linear`: int8 tensor cores."""
    PREFILL = "prefill"
    """`kernels.prefill_linear`: int8 tensor cores, many tokens."""
    UNPACKED = "unpacked"
    """The same after `kernels.unpack` has given every code a byte."""
    BINARY = "binary"
    """`kernels.binary_linear`: the binary tensor core."""
    HALF = "half"
    """`kernels.half_linear`: 16-bit activations."""
    HALF_DECODE = "half_decode"
    """`kernels.half_decode`: the same for a few tokens, in one launch."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class TableKey:
    """What a measured launch was measured for; written ``a8 w2 g-1 22016x4096 m1``."""

    a_bits: int
    """2..8, or 16."""
    w_bits: int
    """1..8."""
    group: int
    """Inputs that share a scale; -1 is the whole row."""
    n: int
    k: int
    m: int
    """One of `BUCKETS`."""

    def __post_init__(self):
        if not (2 <= self.a_bits <= BYTE_BITS or self.a_bits == HALF_BITS):
            raise InvalidTableError(f"a_bits {self.a_bits} is none of 2 to 8 and 16")
        if not 1 <= self.w_bits <= BYTE_BITS:
            raise InvalidTableError(f"w_bits {self.w_bits} is none of 1 to 8")
        if self.group not in GROUPS:
            raise InvalidTableError(f"group {self.group} is none of {GROUPS}")
        if self.n < 1 or self.k < 1:
            raise InvalidTableError(f"{self.n}x{self.k} is no shape")
        if self.m not in BUCKETS:
            raise InvalidTableError(f"m {self.m} is none of {BUCKETS}")

    @property
    def text(self) -> str:
        """How a file writes it."""
        shape = f"{self.n}x{self.k}"
        return f"a{self.a_bits} w{self.w_bits} g{self.group} {shape} m{self.m}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `text`.

        Raises:
            InvalidTableError: if it is no key.
        """
        match = KEY.fullmatch(text)
        if match is None:
            raise InvalidTableError(f"{text!r} is no key; 'a8 w2 g-1 22016x4096 m1' is")
        a_bits, w_bits, group, n, k, m = map(int, match.groups())
        return cls(a_bits=a_bits, w_bits=w_bits, group=group, n=n, k=k, m=m)

    @classmethod
    def of(cls, *, a_bits: int, w_bits: int, group: int, n: int, k: int, m: int) -> Self:
        """The key that answers for any number of tokens: M goes to its bucket."""
        bucket = next((bucket for bucket in BUCKETS if bucket >= m), BUCKETS[-1])
        return cls(a_bits=a_bits, w_bits=w_bits, group=group, n=n, k=k, m=bucket)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """The fastest launch found."""

    key: TableKey
    route: Route
    us: float
    """Median microseconds; also tells a later run of the tuner what it has."""
    config: Mapping[str, int | bool | str | None]
    """Fields of the route's launch configuration."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConfigTable:
    """All entries of one GPU; equal only to itself, so that a cache can key on it."""

    gpu: str
    entries: Mapping[TableKey, TableEntry]
    source: Mapping[str, Any] = field(default_factory=dict)
    """Versions, commit and time of the measurement."""

    def lookup(
        self, key: TableKey, routes: Container[Route] = frozenset(Route)
    ) -> TableEntry | None:
        """Find the entry that is nearest to a shape, as the head of this module says.

        Args:
            key: what is asked for.
            routes: that can answer; entries of others are passed over.
        """
        found = self._nearest(key, routes, any_width=key.a_bits >= BYTE_BITS)
        if found is not None or key.a_bits >= BYTE_BITS:
            return found
        byte_key = TableKey(
            a_bits=BYTE_BITS, w_bits=key.w_bits, group=key.group, n=key.n, k=key.k, m=key.m
        )
        return self._nearest(byte_key, routes, any_width=True)

    def _nearest(
        self, key: TableKey, routes: Container[Route], *, any_width: bool
    ) -> TableEntry | None:
        alike = [
            entry
            for other, entry in self.entries.items()
            if (other.a_bits, other.group, other.m) == (key.a_bits, key.group, key.m)
            and (other.w_bits == key.w_bits or (any_width and other.w_bits > key.w_bits))
            and entry.route in routes
            and _times(key, other) <= MOST_TIMES
        ]
        return min(alike, key=lambda entry: _distance(key, entry.key), default=None)


@lru_cache(maxsize=8)
def load_table(gpu: str, folder: Path = CONFIGS) -> ConfigTable:
    """Read the table of a GPU, or of one that stands in for it, else an empty one.

    Args:
        gpu: as the driver names it.
        folder: where the tables lie.

    Raises:
        InvalidTableError: naming file and key, if the table is wrong.
    """
    path = find_table(gpu, folder)
    return ConfigTable(gpu=gpu, entries={}) if path is None else read_table(path)


def find_table(gpu: str, folder: Path) -> Path | None:
    """Find the file of a GPU, or of one that stands in for it."""
    names = [gpu, *filter(None, [STANDS_IN.get(gpu)])]
    return next((path for name in names if (path := table_path(name, folder)).exists()), None)


def table_path(gpu: str, folder: Path = CONFIGS) -> Path:
    """Where the table of a GPU lies: its name in lower case, words joined by hyphens."""
    return folder / f"{'-'.join(re.findall('[a-z0-9]+', gpu.lower()))}.json"


def read_table(path: Path) -> ConfigTable:
    """Read one file.

    Raises:
        InvalidTableError: naming file and key.
    """
    return read_record(path, _table_of)


def read_record(path: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    """Read a file of a GPU's entries.

    Args:
        path: whose name every error tells.
        read: makes a table of `gpu`, `source` and `entries`.

    Raises:
        InvalidTableError: if it has other fields, or one twice, or `read` raises it.
    """
    try:
        return read(_with_fields(json.loads(path.read_text(), object_pairs_hook=_unique)))
    except (InvalidTableError, json.JSONDecodeError) as error:
        raise InvalidTableError(f"{path.name}: {error}") from error


def _with_fields(record: object) -> Mapping[str, Any]:
    if not isinstance(record, dict) or set(record) != FIELDS:
        raise InvalidTableError(f"its fields must be {sorted(FIELDS)}")
    return record


def write_table(path: Path, table: ConfigTable) -> None:
    """Write what `read_table` reads, one entry a line, in the order of the keys."""
    entries = {key.text: _entry_record(table.entries[key]) for key in sorted(table.entries)}
    write_record(path, table.gpu, table.source, entries)


def write_record(
    path: Path, gpu: str, source: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write what `read_record` reads, one entry a line."""
    lines = ",\n".join(
        f"    {json.dumps(text)}: {json.dumps(entry)}" for text, entry in entries.items()
    )
    head = f'  "gpu": {json.dumps(gpu)},\n  "source": {json.dumps(dict(source))},\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    # an earlier file stays whole until the new one is
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{\n{head}  "entries": {{\n{lines}\n  }}\n}}\n')
    partial.replace(path)


def _entry_record(entry: TableEntry) -> dict[str, Any]:
    return {"route": entry.route.value, "us": entry.us, "config": dict(entry.config)}


def _table_of(record: Mapping[str, Any]) -> ConfigTable:
    entries = [_read_entry(text, value) for text, value in record["entries"].items()]
    return ConfigTable(
        gpu=record["gpu"],
        source=record["source"],
        entries={entry.key: entry for entry in entries},
    )


def _read_entry(text: str, value: object) -> TableEntry:
    key = TableKey.parse(text)
    if not isinstance(value, dict) or set(value) != ENTRY_FIELDS:
        raise InvalidTableError(f"{text}: its fields must be {sorted(ENTRY_FIELDS)}")
    if value["route"] not in set(Route):
        raise InvalidTableError(
            f"{text}: route {value['route']!r} is none of {list(map(str, Route))}"
        )
    if not isinstance(value["us"], int | float) or not 0 < value["us"] < math.inf:
        raise InvalidTableError(f"{text}: us {value['us']!r} is no time")
    config = value["config"]
    if not isinstance(config, dict) or not all(
        isinstance(each, int | bool | str | None) for each in config.values()
    ):
        raise InvalidTableError(f"{text}: config {config!r} is no set of whole numbers and names")
    return TableEntry(key=key, route=Route(value["route"]), us=float(value["us"]), config=config)


def _times(key: TableKey, other: TableKey) -> float:
    """How many times one weight is as large as the other."""
    sizes = sorted((key.n * key.k, other.n * other.k))
    return sizes[1] / sizes[0]


def _distance(wanted: TableKey, other: TableKey) -> tuple[int, float, TableKey]:
    ratio = abs(math.log(wanted.n * wanted.k / (other.n * other.k)))
    # the key last: equal distances must not depend on the order of the file
    return other.w_bits - wanted.w_bits, ratio, other


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise InvalidTableError(f"{name} occurs twice")
        record[name] = value
    return record

"""How decode attention is launched: measured launches, one JSON file a GPU, else arithmetic.

    entries["h8 g4 d128 kv8 t4096"] = launch
            key-value heads, query heads of each, dims, bits, tokens that the block table can hold

Other tables of the same heads, dims and bits take the entry whose number of tokens is nearest as a
ratio. The batch is in no key: a sequence gives the same bits in every batch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch

from kernels.kv_pages import RAW_BITS, KvPages
from kernels.tables import InvalidTableError, find_table, read_record, write_record

__all__ = [
    "ATTENTION_CONFIGS",
    "AttentionKey",
    "AttentionTable",
    "LaunchConfig",
    "load_attention_table",
    "read_attention_table",
    "select_config",
    "write_attention_table",
]

ATTENTION_CONFIGS = Path(__file__).parent / "configs" / "attention"
KEY = re.compile(r"h(\d+) g(\d+) d(\d+) kv(\d+) t(\d+)")
PROGRAMS = 128
"""One for each of an H100's 132 processors, with one sequence."""
MOST_SPLITS = 64
WIDE_HEAD = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How a sequence is split, and the tile of a program."""

    splits: int
    """Chunks at most; 1 needs no second kernel."""
    min_chunk: int
    """Tokens of a chunk at least."""
    block_t: int
    num_warps: int
    num_stages: int
    ahead: int = 2
    """Tiles of a chunk that are asked for before the kernel ahead has ended; changes no bit."""
    combine_block_d: int = 32
    pdl: bool = False
    """Programmatic dependent launch: only where all kernels of the stream wait for each other, and
    lengths and block tables were written before the kernel ahead."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class AttentionKey:
    """What a launch was measured for; written ``h8 g4 d128 kv8 t4096``."""

    kv_heads: int
    group: int
    """Query heads of a key-value head."""
    head_dim: int
    bits: int
    tokens: int
    """What the block table can hold."""

    @property
    def text(self) -> str:
        """How a file writes it."""
        return f"h{self.kv_heads} g{self.group} d{self.head_dim} kv{self.bits} t{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `text`.

        Raises:
            InvalidTableError: if it is no key.
        """
        match = KEY.fullmatch(text)
        if match is None:
            raise InvalidTableError(f"{text!r} is no key; 'h8 g4 d128 kv8 t4096' is")
        kv_heads, group, head_dim, bits, tokens = map(int, match.groups())
        return cls(kv_heads=kv_heads, group=group, head_dim=head_dim, bits=bits, tokens=tokens)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionTable:
    """All entries of one GPU."""

    gpu: str
    entries: Mapping[AttentionKey, LaunchConfig]
    source: Mapping[str, Any] = field(default_factory=dict)
    """Versions and times of the measurement."""

    def lookup(self, key: AttentionKey) -> LaunchConfig | None:
        """Find the entry of a shape, the nearest in tokens; None where the shape has none."""
        alike = [
            other
            for other in self.entries
            if (other.kv_heads, other.group, other.head_dim, other.bits)
            == (key.kv_heads, key.group, key.head_dim, key.bits)
        ]
        nearest = min(
            alike,
            # the shorter of two that are as near, whatever the order of the file
            key=lambda other: (abs(math.log(other.tokens / key.tokens)), other.tokens),
            default=None,
        )
        return None if nearest is None else self.entries[nearest]


def select_config(
    pages: KvPages, max_context: int, *, group: int, table: AttentionTable | None = None
) -> LaunchConfig:
    """Pick the launch: of the table, else from the compiled code, where none of these spills.

    Args:
        pages: heads, dims and bits count.
        max_context: tokens that the block table can hold.
        group: query heads of a key-value head.
        table: None for that of the GPU of the pages.
    """
    key = AttentionKey(
        kv_heads=pages.kv_heads,
        group=group,
        head_dim=pages.head_dim,
        bits=pages.bits,
        tokens=max(1, max_context),
    )
    if table is None:
        return _chosen(key, pages.codes.device)
    return table.lookup(key) or _computed_config(key)


def load_attention_table(gpu: str, folder: Path = ATTENTION_CONFIGS) -> AttentionTable:
    """Read the table of a GPU, or of one that stands in for it, else an empty one.

    Raises:
        InvalidTableError: naming file and key, if the table is wrong.
    """
    path = find_table(gpu, folder)
    return AttentionTable(gpu=gpu, entries={}) if path is None else read_attention_table(path)


def read_attention_table(path: Path) -> AttentionTable:
    """Read one file.

    Raises:
        InvalidTableError: naming file and key.
    """
    return read_record(path, _table_from)


def write_attention_table(path: Path, table: AttentionTable) -> None:
    """Write what `read_attention_table` reads, one entry a line, in the order of the keys."""
    entries = {key.text: _record_of(table.entries[key]) for key in sorted(table.entries)}
    write_record(path, table.gpu, table.source, entries)


@lru_cache(maxsize=1024)
def _chosen(key: AttentionKey, device: torch.device) -> LaunchConfig:
    """A launch of every layer asks for the same."""
    return _table_of(device).lookup(key) or _computed_config(key)


@lru_cache
def _table_of(device: torch.device) -> AttentionTable:
    if device.type != "cuda":
        return AttentionTable(gpu=str(device), entries={})
    return load_attention_table(torch.cuda.get_device_name(device))


def _computed_config(key: AttentionKey) -> LaunchConfig:
    is_large = key.head_dim > WIDE_HEAD
    block_t, num_warps = (64 if is_large or key.bits == RAW_BITS else 128), 4
    if key.bits == 2:
        # a field of two bits has too few dims for more warps to share
        block_t, num_warps = 32, 2 if is_large else 1
    min_chunk = max(64, block_t)
    # as many warps with few bits as with many; programs without a chunk cost as well
    wanted = max(1, PROGRAMS * 4 // num_warps // key.kv_heads)
    longest = 1 << (-(-key.tokens // min_chunk) - 1).bit_length()
    # tiles of bytes are large: more programs are resident where each holds one of keys, one of
    # values
    num_stages = 2 if 4 < key.bits < RAW_BITS else 3
    return LaunchConfig(
        splits=min(MOST_SPLITS, wanted, longest),
        min_chunk=min_chunk,
        block_t=block_t,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _record_of(config: LaunchConfig) -> dict[str, int]:
    record = asdict(config)
    # a matter of the stream, not of the shape
    del record["pdl"]
    return record


def _table_from(record: Mapping[str, Any]) -> AttentionTable:
    entries = {
        AttentionKey.parse(text): _read_config(text, config)
        for text, config in record["entries"].items()
    }
    return AttentionTable(gpu=record["gpu"], entries=entries, source=record["source"])


def _read_config(text: str, record: object) -> LaunchConfig:
    expected = set(LaunchConfig.__dataclass_fields__) - {"pdl"}
    if not isinstance(record, dict) or set(record) != expected:
        raise InvalidTableError(f"{text}: need {sorted(expected)}")
    least = {"ahead": 0}
    if not all(
        type(value) is int and value >= least.get(name, 1) for name, value in record.items()
    ):
        raise InvalidTableError(f"{text}: {record} is no set of positive integers")
    return LaunchConfig(**record)

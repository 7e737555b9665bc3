"""The next token of every row of a batch: greedy, temperature, top-k, top-p and min-p, on the GPU.

    kept   the top_k largest logits, ties included; of these the fewest largest whose probabilities
           at the row's temperature reach top_p of theirs, ties included; of these all at least
           min_p as likely as the likeliest
    token  argmax over kept of logit / temperature + G        G = -log(-log(1 - u))
    u      word i % 1024 // 256 of Philox 4x32-10, key seed, counter (i // 1024 256 + i % 256,
           position, 0, 0), for token id i

So a draw depends on its row, seed and position alone: neither on the batch nor on the launch. A
temperature below 1e-5 is greedy, the lowest id among equals. A row with a logit that is NaN or
infinity, or with nothing but -infinity, gives -1. Nothing is sorted and nothing waits for the host:
thresholds are found digit by digit (`kernels._sampling_kernels`) in a fixed number of launches, and
probabilities are summed as integers, which have no order.

Shape legend: M rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
import triton

from kernels._sampling_kernels import choose_kernel, draw_kernel, peak_kernel, search_kernel

__all__ = ["Filters", "LaunchConfig", "SamplingRows", "sample_tokens", "select_config"]

TILE = 1024
LANES = TILE // 4
MAX_VOCABULARY = 1 << 20
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
"""Bits of a key: those of a float32 that the dtype uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """What every row asks for, all ``[M]`` on the device of the logits."""

    temperature: torch.Tensor
    """float32; below 1e-5 greedy."""
    top_k: torch.Tensor
    """int32; 0 or less keeps all."""
    top_p: torch.Tensor
    """float32 above 0; 1 or more keeps all."""
    min_p: torch.Tensor
    """float32; 0 keeps all."""
    seed: torch.Tensor
    """int64."""
    position: torch.Tensor
    """int32 or int64: the index of the token to draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which limits any row may have; a limit that is off here is not looked at."""

    top_k: bool = False
    top_p: bool = False
    min_p: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Launch parameters; none changes what is drawn."""

    splits: int
    """Slices of the vocabulary, a power of two."""
    digit_bits: int = 4
    """Bits of a threshold that one launch finds: 1 to 5."""
    block: int = 256
    """Logits a search program weighs at a time, a power of two; above 512 four warps spill."""
    num_warps: int = 4
    launch_pdl: bool = False
    """Start while the kernel before still runs (programmatic dependent launch)."""


def select_config(
    m: int, vocabulary: int, table: dict[tuple[int, int], LaunchConfig] | None = None
) -> LaunchConfig:
    """Pick the launch for M rows: not measured. A table by (M, V) comes first.

    A few hundred programs fill the GPU; a slice is whole tiles of 1024 logits.
    """
    if table is not None and (m, vocabulary) in table:
        return table[m, vocabulary]
    tiles = triton.next_power_of_2(triton.cdiv(vocabulary, TILE))
    wanted = triton.next_power_of_2(triton.cdiv(512, max(m, 1)))
    return LaunchConfig(splits=min(tiles, max(8, min(wanted, 128))))


def sample_tokens(
    logits_MV: torch.Tensor,
    rows: SamplingRows,
    filters: Filters,
    *,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Draw a token for every row.

    Args:
        logits_MV: float16, bfloat16 or float32 ``[M, V]``, V contiguous and at most 2^20.
        rows: what every row asks for.
        filters: which limits to look at.
        out: int32 ``[M]``, written to and returned; None allocates.
        config: None takes `select_config`.

    Returns:
        int32 ``[M]``; -1 where a row cannot be drawn from.

    Raises:
        ValueError: if the logits or the rows have another form.
    """
    _check(logits_MV, rows)
    m, vocabulary = logits_MV.shape
    tokens = logits_MV.new_empty(m, dtype=torch.int32) if out is None else out
    if m:
        config = config or select_config(m, vocabulary)
        _Sampling(logits_MV, rows, filters, config).draw(tokens)
    return tokens


class _Sampling:
    """The launches of one call and what they hand on."""

    def __init__(
        self, logits: torch.Tensor, rows: SamplingRows, filters: Filters, config: LaunchConfig
    ) -> None:
        m, vocabulary = logits.shape
        self.logits, self.rows, self.filters, self.config = logits, rows, filters, config
        bits = KEY_BITS[logits.dtype]
        levels = triton.cdiv(bits, config.digit_bits)
        slots = (levels, m, config.splits, 1 << config.digit_bits)
        self.peaks = logits.new_empty((m, config.splits), dtype=torch.float32)
        self.count_bases = logits.new_empty((levels, m), dtype=torch.int64)
        self.count_sums = logits.new_empty(slots if filters.top_k else (1,), dtype=torch.int64)
        self.mass_bases = torch.empty_like(self.count_bases)
        self.mass_sums = logits.new_empty(slots if filters.top_p else (1,), dtype=torch.int64)
        self.lowest = logits.new_empty(m, dtype=torch.int64)
        tiles = triton.cdiv(triton.cdiv(vocabulary, config.splits), TILE)
        pdl = config.launch_pdl and logits.is_cuda
        self.grid = (m, config.splits)
        self.digits = {
            "LEVELS": levels, "DIGIT_BITS": config.digit_bits, "KEY_SHIFT": 32 - bits,
        }  # fmt: skip
        self.slices = {"SLICE": tiles * TILE, "SPLITS": config.splits}
        self.options = {
            "PDL": pdl, "num_warps": config.num_warps, "enable_fp_fusion": False,
            **({"launch_pdl": True} if pdl else {}),
        }  # fmt: skip

    def draw(self, tokens: torch.Tensor) -> None:
        """Launch all kernels in order."""
        if self.filters.top_p or self.filters.min_p:
            peak_kernel[self.grid](
                self.logits, self.logits.stride(0),
                self.peaks,
                self.logits.shape[1],
                BLOCK=TILE, **self.slices, **self.options,
            )  # fmt: skip
        if self.filters.top_k:
            self._search(self.rows.top_k, self.count_bases, self.count_sums, by_mass=False)
        if self.filters.top_p:
            self._search(self.rows.top_p, self.mass_bases, self.mass_sums, by_mass=True)
        self._choose(tokens)

    def _search(
        self, limit: torch.Tensor, bases: torch.Tensor, sums: torch.Tensor, *, by_mass: bool
    ) -> None:
        for level in range(self.digits["LEVELS"]):
            search_kernel[self.grid](
                self.logits, self.logits.stride(0),
                self.rows.temperature, limit, self.peaks,
                bases, sums,
                self.rows.top_k, self.count_bases, self.count_sums, self.lowest,
                *self.logits.shape,
                LEVEL=level,
                MASS=by_mass,
                AFTER_COUNT=by_mass and self.filters.top_k,
                BLOCK=self.config.block, **self.digits, **self.slices, **self.options,
            )  # fmt: skip

    def _choose(self, tokens: torch.Tensor) -> None:
        rows = self.rows
        scores, ids = torch.empty_like(self.peaks), torch.empty_like(self.peaks, dtype=torch.int32)
        draw_kernel[self.grid](
            self.logits, self.logits.stride(0),
            rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.position,
            self.peaks, self.count_bases, self.count_sums, self.mass_bases, self.mass_sums,
            scores, ids,
            *self.logits.shape,
            HAS_COUNT=self.filters.top_k,
            HAS_MASS=self.filters.top_p,
            HAS_MIN_P=self.filters.min_p,
            LANES=LANES, **self.digits, **self.slices, **self.options,
        )  # fmt: skip
        choose_kernel[(len(tokens),)](
            scores, ids, tokens, self.logits.shape[1], SPLITS=self.config.splits, **self.options
        )


def _check(logits: torch.Tensor, rows: SamplingRows) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or logits.dtype not in KEY_BITS:
        raise ValueError(
            f"need float rows of contiguous logits, got {logits.dtype} {tuple(logits.shape)}"
            f" with strides {logits.stride()}"
        )
    m, vocabulary = logits.shape
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocabulary}, need 1 to {MAX_VOCABULARY}")
    for name in SamplingRows.__slots__:
        each = getattr(rows, name)
        if each.shape != (m,) or each.device != logits.device:
            raise ValueError(f"{name} {tuple(each.shape)} on {each.device} for {m} rows")

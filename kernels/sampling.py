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

Shape legend: M rows, V vocabulary, S slots that hold what rows ask for (M where none are named).
"""

from dataclasses import dataclass

import torch
import triton

from kernels._sampling_kernels import choose_kernel, draw_kernel, peak_kernel, search_kernel
from kernels.scratch import Piece, Scratch, bytes_of

__all__ = [
    "Filters",
    "LaunchConfig",
    "SamplingRows",
    "sample_tokens",
    "scratch_bytes",
    "select_config",
]

TILE = 1024
LANES = TILE // 4
MAX_VOCABULARY = 1 << 20
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
"""Bits of a key: those of a float32 that the dtype uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """What every row asks for, all ``[S]`` on the device of the logits."""

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
    slots: torch.Tensor | None = None,
    advance: bool = False,
    out: torch.Tensor | None = None,
    scratch: Scratch | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """Draw a token for every row.

    Args:
        logits_MV: float16, bfloat16 or float32 ``[M, V]``, V contiguous and at most 2^20.
        rows: what every row asks for.
        filters: which limits to look at.
        slots: int64 ``[M]``, the slot of every row; None takes row i for slot i.
        advance: add one to the position of every row; then no two rows share a slot whose position
            matters.
        out: int32 ``[M]``, written to and returned; None allocates.
        scratch: of at least `scratch_bytes`; None allocates.
        config: None takes `select_config`.

    Returns:
        int32 ``[M]``; -1 where a row cannot be drawn from.

    Raises:
        ValueError: if the logits or the rows have another form.
    """
    _check(logits_MV, rows, slots)
    m, vocabulary = logits_MV.shape
    tokens = logits_MV.new_empty(m, dtype=torch.int32) if out is None else out
    if m:
        config = config or select_config(m, vocabulary)
        pieces = (scratch or Scratch.on_demand(logits_MV.device)).lay_out(
            _pieces(m, KEY_BITS[logits_MV.dtype], filters, config)
        )
        _Sampling(logits_MV, rows, slots, filters, config, pieces).draw(tokens, advance=advance)
    return tokens


def scratch_bytes(rows: int, vocabulary: int) -> int:
    """Bytes that any call of up to so many rows takes of its scratch, with chosen launches."""
    every = Filters(top_k=True, top_p=True, min_p=True)
    return max(
        bytes_of(_pieces(m, max(KEY_BITS.values()), every, select_config(m, vocabulary)))
        for m in range(1, rows + 1)
    )


def _pieces(m: int, bits: int, filters: Filters, config: LaunchConfig) -> dict[str, Piece]:
    """What the launches of one call hand on."""
    levels = triton.cdiv(bits, config.digit_bits)
    sums = Piece((levels, m, config.splits, 1 << config.digit_bits), torch.int64)
    unused = Piece((1,), torch.int64)
    return {
        "peaks": Piece((m, config.splits), torch.float32),
        "count_bases": Piece((levels, m), torch.int64),
        "count_sums": sums if filters.top_k else unused,
        "mass_bases": Piece((levels, m), torch.int64),
        "mass_sums": sums if filters.top_p else unused,
        "lowest": Piece((m,), torch.int64),
        "scores": Piece((m, config.splits), torch.float32),
        "ids": Piece((m, config.splits), torch.int32),
    }


class _Sampling:
    """The launches of one call."""

    def __init__(
        self,
        logits: torch.Tensor,
        rows: SamplingRows,
        slots: torch.Tensor | None,
        filters: Filters,
        config: LaunchConfig,
        pieces: dict[str, torch.Tensor],
    ) -> None:
        m, vocabulary = logits.shape
        self.logits, self.rows, self.filters, self.config = logits, rows, filters, config
        # a pointer that nobody follows where rows have no slots
        self.slots = pieces["lowest"] if slots is None else slots
        self.pieces = pieces
        bits = KEY_BITS[logits.dtype]
        tiles = triton.cdiv(triton.cdiv(vocabulary, config.splits), TILE)
        pdl = config.launch_pdl and logits.is_cuda
        self.grid = (m, config.splits)
        self.digits = {
            "LEVELS": triton.cdiv(bits, config.digit_bits), "DIGIT_BITS": config.digit_bits,
            "KEY_SHIFT": 32 - bits,
        }  # fmt: skip
        self.slotted = {"SLOTTED": slots is not None}
        self.slices = {"SLICE": tiles * TILE, "SPLITS": config.splits}
        self.options = {
            "PDL": pdl, "num_warps": config.num_warps, "enable_fp_fusion": False,
            **({"launch_pdl": True} if pdl else {}),
        }  # fmt: skip

    def draw(self, tokens: torch.Tensor, *, advance: bool) -> None:
        """Launch all kernels in order."""
        if self.filters.top_p or self.filters.min_p:
            peak_kernel[self.grid](
                self.logits, self.logits.stride(0),
                self.pieces["peaks"],
                self.logits.shape[1],
                BLOCK=TILE, **self.slices, **self.options,
            )  # fmt: skip
        if self.filters.top_k:
            self._search("count", self.rows.top_k)
        if self.filters.top_p:
            self._search("mass", self.rows.top_p)
        self._choose(tokens, advance=advance)

    def _search(self, kind: str, limit: torch.Tensor) -> None:
        rows, pieces, by_mass = self.rows, self.pieces, kind == "mass"
        for level in range(self.digits["LEVELS"]):
            search_kernel[self.grid](
                self.logits, self.logits.stride(0),
                self.slots, rows.temperature, limit, pieces["peaks"],
                pieces[f"{kind}_bases"], pieces[f"{kind}_sums"],
                rows.top_k, pieces["count_bases"], pieces["count_sums"], pieces["lowest"],
                *self.logits.shape, level,
                FIRST=level == 0,
                MASS=by_mass,
                AFTER_COUNT=by_mass and self.filters.top_k,
                BLOCK=self.config.block,
                **self.digits, **self.slotted, **self.slices, **self.options,
            )  # fmt: skip

    def _choose(self, tokens: torch.Tensor, *, advance: bool) -> None:
        rows, pieces = self.rows, self.pieces
        draw_kernel[self.grid](
            self.logits, self.logits.stride(0), self.slots,
            rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.position,
            pieces["peaks"],
            pieces["count_bases"], pieces["count_sums"], pieces["mass_bases"], pieces["mass_sums"],
            pieces["scores"], pieces["ids"],
            *self.logits.shape,
            HAS_COUNT=self.filters.top_k,
            HAS_MASS=self.filters.top_p,
            HAS_MIN_P=self.filters.min_p,
            LANES=LANES, **self.digits, **self.slotted, **self.slices, **self.options,
        )  # fmt: skip
        choose_kernel[(len(tokens),)](
            pieces["scores"], pieces["ids"], self.slots,
            tokens, rows.position,
            self.logits.shape[1],
            ADVANCE=advance, SPLITS=self.config.splits, **self.slotted, **self.options,
        )  # fmt: skip


def _check(logits: torch.Tensor, rows: SamplingRows, slots: torch.Tensor | None) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or logits.dtype not in KEY_BITS:
        raise ValueError(
            f"need float rows of contiguous logits, got {logits.dtype} {tuple(logits.shape)}"
            f" with strides {logits.stride()}"
        )
    m, vocabulary = logits.shape
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocabulary}, need 1 to {MAX_VOCABULARY}")
    if slots is not None and (slots.shape != (m,) or slots.dtype is not torch.int64):
        raise ValueError(f"slots {slots.dtype} {tuple(slots.shape)} for {m} rows, need int64")
    held = m if slots is None else len(rows.seed)
    for name in SamplingRows.__slots__:
        each = getattr(rows, name)
        if each.shape != (held,) or each.device != logits.device or not each.is_contiguous():
            raise ValueError(f"{name} {tuple(each.shape)} on {each.device} for {held} rows")

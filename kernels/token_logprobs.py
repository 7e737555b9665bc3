"""How likely the drawn token of every row was, and which were the likeliest.

    logprob = x - log(sum exp(x - peak)) - peak        float32, of the logits as the model gave them

Equal logits come in the order of their ids. A row is cut into slices of 4096 logits whatever the
batch is, so its sums have one order. A slice leaves its peak, its sum and its likeliest tokens as
keys of 64 bits: an integer in the order of the logits, then the complement of the id; so the
largest key is the likeliest token, the lowest id among equals.

Shape legend: M rows, V vocabulary, S slots, T = 20 likeliest tokens.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl

from kernels.scratch import Piece, Scratch, bytes_of

__all__ = [
    "LIKELIEST",
    "RowLogprobs",
    "logprob_scratch_bytes",
    "measure_logprobs",
    "measure_logprobs_reference",
]

LIKELIEST = 20
LANES = 32
"""Places for the keys of a slice, a power of two."""
SLICE = 4096
LOWEST_KEY = tl.constexpr(-(1 << 63))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogprobs:
    """What is known of rows; a row whose slot does not ask keeps what it had."""

    chosen: torch.Tensor
    """float32 ``[M]``"""
    top: torch.Tensor
    """float32 ``[M, T]`` in falling order; -infinity behind the last of a small vocabulary."""
    top_ids: torch.Tensor
    """int32 ``[M, T]``; -1 behind the last of a small vocabulary."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Self:
        """Make room for so many rows."""
        return cls(
            chosen=torch.zeros(rows, device=device),
            top=torch.zeros(rows, LIKELIEST, device=device),
            top_ids=torch.zeros(rows, LIKELIEST, dtype=torch.int32, device=device),
        )


def measure_logprobs(
    logits_MV: torch.Tensor,
    tokens_M: torch.Tensor,
    wanted_S: torch.Tensor,
    slots_M: torch.Tensor,
    out: RowLogprobs,
    *,
    scratch: Scratch | None = None,
) -> None:
    """Measure the rows whose slots ask for it, in two launches.

    Args:
        logits_MV: float16, bfloat16 or float32 ``[M, V]``, V contiguous.
        tokens_M: int32 ``[M]``, drawn; -1 gives NaN.
        wanted_S: int32 ``[S]``: 1 where a slot asks.
        slots_M: int64 ``[M]``.
        out: of at least M rows; the first M are written.
        scratch: of at least `logprob_scratch_bytes`; None allocates.

    Raises:
        ValueError: if the logits have another form.
    """
    _check(logits_MV)
    m, vocabulary = logits_MV.shape
    if not m:
        return
    pieces = (scratch or Scratch.on_demand(logits_MV.device)).lay_out(_pieces(m, vocabulary))
    splits = triton.cdiv(vocabulary, SLICE)
    _slice_kernel[(m, splits)](
        logits_MV, logits_MV.stride(0), wanted_S, slots_M,
        pieces["peaks"], pieces["sums"], pieces["keys"],
        vocabulary,
        SPLITS=splits, TOP=LIKELIEST, LANES=LANES, SLICE=SLICE,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _merge_kernel[(m,)](
        logits_MV, logits_MV.stride(0), wanted_S, slots_M, tokens_M,
        pieces["peaks"], pieces["sums"], pieces["keys"],
        out.chosen, out.top, out.top_ids,
        SPLITS=splits, PARTS=triton.next_power_of_2(splits), TOP=LIKELIEST, LANES=LANES,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def logprob_scratch_bytes(rows: int, vocabulary: int) -> int:
    """Bytes that any call of up to so many rows takes of its scratch."""
    return bytes_of(_pieces(rows, vocabulary))


def measure_logprobs_reference(
    logits_MV: torch.Tensor,
    tokens_M: torch.Tensor,
    wanted_S: torch.Tensor,
    slots_M: torch.Tensor,
    out: RowLogprobs,
) -> None:
    """Measure as `measure_logprobs` does, up to the rounding of one sum, on any device."""
    rows = wanted_S[slots_M].nonzero()[:, 0]
    if not len(rows):
        return
    x_MV = logits_MV[rows].float()
    logprobs_MV = torch.log_softmax(x_MV, dim=1)
    tokens = tokens_M[rows].long()
    drawn = logprobs_MV.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    out.chosen[rows] = drawn.where(tokens >= 0, torch.nan)
    count = min(LIKELIEST, x_MV.shape[1])
    # a stable sort keeps equals in the order of their ids
    ids = x_MV.sort(dim=1, descending=True, stable=True).indices[:, :count]
    out.top[rows] = -torch.inf
    out.top_ids[rows] = -1
    out.top[rows, :count] = logprobs_MV.gather(1, ids)
    out.top_ids[rows, :count] = ids.int()


def _pieces(m: int, vocabulary: int) -> dict[str, Piece]:
    splits = triton.cdiv(vocabulary, SLICE)
    return {
        "peaks": Piece((m, splits), torch.float32),
        "sums": Piece((m, splits), torch.float32),
        "keys": Piece((m, splits, LANES), torch.int64),
    }


@triton.jit
def _slice_kernel(
    logits_ptr, stride_lm, wanted_ptr, slots_ptr,
    peaks_ptr, sums_ptr, keys_ptr,
    V,
    SPLITS: tl.constexpr,
    TOP: tl.constexpr,
    LANES: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """One program finds peak, sum and likeliest tokens of a slice of a row."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if tl.load(wanted_ptr + tl.load(slots_ptr + row)) != 0:
        offs = split * SLICE + tl.arange(0, SLICE)
        mask = offs < V
        x = tl.load(logits_ptr + row * stride_lm + offs, mask=mask, other=float("-inf"))
        x = x.to(tl.float32)
        peak = tl.max(x, 0)
        # a slice of nothing but -infinity sums to 0
        base = tl.where(peak == float("-inf"), 0.0, peak)
        place = row * SPLITS + split
        tl.store(peaks_ptr + place, peak)
        tl.store(sums_ptr + place, tl.sum(tl.exp(x - base), 0))
        keys = tl.where(mask, _key(x, offs), LOWEST_KEY)
        top = _largest(keys, TOP, LANES)
        tl.store(keys_ptr + place * LANES + tl.arange(0, LANES), top)


@triton.jit
def _merge_kernel(
    logits_ptr, stride_lm, wanted_ptr, slots_ptr, tokens_ptr,
    peaks_ptr, sums_ptr, keys_ptr,
    chosen_ptr, top_ptr, top_ids_ptr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    TOP: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """One program puts the slices of a row together."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(wanted_ptr + tl.load(slots_ptr + row)) != 0:
        parts = tl.arange(0, PARTS)
        held = parts < SPLITS
        peaks = tl.load(peaks_ptr + row * SPLITS + parts, mask=held, other=float("-inf"))
        sums = tl.load(sums_ptr + row * SPLITS + parts, mask=held, other=0.0)
        peak = tl.max(peaks, 0)
        base = tl.where(peaks == float("-inf"), peak, peaks)
        total = tl.log(tl.sum(sums * tl.exp(base - peak), 0))

        token = tl.load(tokens_ptr + row)
        x = tl.load(logits_ptr + row * stride_lm + token, mask=token >= 0, other=float("nan"))
        tl.store(chosen_ptr + row, x.to(tl.float32) - peak - total)

        lanes = tl.arange(0, LANES)
        places = parts[:, None] * LANES + lanes[None, :]
        keys = tl.load(
            keys_ptr + row * SPLITS * LANES + places,
            mask=held[:, None] & (lanes < TOP)[None, :],
            other=LOWEST_KEY,
        )
        top = _largest(tl.reshape(keys, (PARTS * LANES,)), TOP, LANES)
        ids = 2147483647 - (top & 0x7FFFFFFF).to(tl.int32)
        found = top != LOWEST_KEY
        x = tl.load(logits_ptr + row * stride_lm + ids, mask=found, other=float("-inf"))
        kept = lanes < TOP
        tl.store(top_ptr + row * TOP + lanes, x.to(tl.float32) - peak - total, mask=kept)
        tl.store(top_ids_ptr + row * TOP + lanes, tl.where(found, ids, -1), mask=kept)


@triton.jit
def _key(x, ids):
    """int64: the order of a float32 above, the complement of the id below."""
    # both zeros are equal
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) | (2147483647 - ids).to(tl.int64)


@triton.jit
def _largest(keys, TOP: tl.constexpr, LANES: tl.constexpr):
    """The TOP largest of distinct keys in falling order: int64 ``[LANES]``."""
    lanes = tl.arange(0, LANES)
    found = tl.full((LANES,), LOWEST_KEY, dtype=tl.int64)
    for i in range(TOP):
        largest = tl.max(keys, 0)
        found = tl.where(lanes == i, largest, found)
        keys = tl.where(keys == largest, LOWEST_KEY, keys)
    return found


def _check(logits: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.is_floating_point():
        raise ValueError(
            f"need float rows of contiguous logits, got {logits.dtype} {tuple(logits.shape)}"
            f" with strides {logits.stride()}"
        )

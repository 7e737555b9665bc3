"""What changes logits before a draw: penalties, biases, tokens held back, and guides.

    x   logit in float32
    x   x / r where x > 0, else x r                where the token is in prompt or answer
    x   x - frequency c - presence (c > 0)         c times in the answer
    x   x + bias
    x   -infinity                                  for an end token before its time, and for what a
                                                   guide forbids

A slot has a count of every token, int16: bit 15 says that the prompt has it, the rest how often the
answer has it, up to 32767. The bits of a guide's mask lie in int32 words, lowest first. A slot with
a guide holds no end token back: the guide says when an answer may end.

One program changes a tile of a row in registers and stores it; then it goes over the few tokens of
the tile that have a bias, then over those that are held back. A result depends on its row alone.

Shape legend: M rows, V vocabulary, S slots, W = V / 32 words rounded up, B biases, E ends.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = [
    "IN_PROMPT",
    "MAX_COUNT",
    "WORD_BITS",
    "TokenRules",
    "apply_rules",
    "apply_rules_reference",
    "count_tokens",
    "count_tokens_reference",
]

MAX_COUNT = 0x7FFF
IN_PROMPT = -0x8000
"""Bit 15 of a count."""
BLOCK = 2048
WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """The rules of every slot, on one device."""

    counts: torch.Tensor
    """int16 ``[S, V]``; see above. Looked at where a slot is penalized."""
    is_penalized: torch.Tensor
    """int32 ``[S]``: 0 or 1."""
    repetition: torch.Tensor
    """float32 ``[S]``, above 0; 1 changes nothing."""
    presence: torch.Tensor
    """float32 ``[S]``"""
    frequency: torch.Tensor
    """float32 ``[S]``"""
    biases: torch.Tensor
    """int32 ``[S]``: how many tokens have one."""
    bias_ids: torch.Tensor
    """int32 ``[S, B]``, each id once, B a power of two."""
    bias_values: torch.Tensor
    """float32 ``[S, B]``"""
    ends: torch.Tensor
    """int32 ``[S]``: how many tokens are held back."""
    end_ids: torch.Tensor
    """int32 ``[S, E]``, E a power of two."""
    ends_from: torch.Tensor
    """int64 ``[S]``: the position from which they may be drawn."""
    position: torch.Tensor
    """int64 ``[S]``: of the token to draw."""
    is_guided: torch.Tensor
    """int32 ``[S]``: 0 or 1."""
    masks: torch.Tensor
    """int32 ``[S, W]``: bit 1 for a token that a guide allows."""


def apply_rules(
    logits_MV: torch.Tensor,
    rules: TokenRules,
    slots_M: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Change logits by the rules of their slots, in one launch.

    Args:
        logits_MV: float16, bfloat16 or float32 ``[M, V]``, V contiguous; stays as it is.
        rules: of V tokens.
        slots_M: int64 ``[M]``, below S.
        out: float32 ``[M, V]``, V contiguous, written to and returned; None allocates.

    Raises:
        ValueError: if logits, rules or slots do not fit each other.
    """
    _check(logits_MV, rules, slots_M)
    m, vocabulary = logits_MV.shape
    if out is None:
        out = torch.empty_like(logits_MV, dtype=torch.float32)
    if m:
        _rules_kernel[(m, triton.cdiv(vocabulary, BLOCK))](
            logits_MV, logits_MV.stride(0), slots_M,
            rules.counts, rules.is_penalized, rules.repetition, rules.presence, rules.frequency,
            rules.biases, rules.bias_ids, rules.bias_values,
            rules.ends, rules.end_ids, rules.ends_from, rules.position,
            rules.is_guided, rules.masks,
            out, out.stride(0),
            vocabulary, rules.masks.shape[1],
            BIASES=rules.bias_ids.shape[1], ENDS=rules.end_ids.shape[1], BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def apply_rules_reference(
    logits_MV: torch.Tensor,
    rules: TokenRules,
    slots_M: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Change logits as `apply_rules` does, bit for bit, on any device."""
    x_MV = logits_MV.to(torch.float32, copy=True)
    penalized = rules.is_penalized[slots_M].nonzero()[:, 0]
    if len(penalized):
        x_MV[penalized] = _penalized(x_MV[penalized], rules, slots_M[penalized])
    for row, slot in enumerate(slots_M.tolist()):
        biases = int(rules.biases[slot])
        ids = rules.bias_ids[slot, :biases].long()
        x_MV[row, ids] += rules.bias_values[slot, :biases]
        if rules.is_guided[slot]:
            x_MV[row].masked_fill_(~_allowed(rules.masks[slot], x_MV.shape[1]), -torch.inf)
        elif rules.position[slot] < rules.ends_from[slot]:
            x_MV[row, rules.end_ids[slot, : int(rules.ends[slot])].long()] = -torch.inf
    return x_MV if out is None else out.copy_(x_MV)


def count_tokens(tokens_M: torch.Tensor, rules: TokenRules, slots_M: torch.Tensor) -> None:
    """Count drawn tokens where a slot is penalized, in one launch.

    Args:
        tokens_M: int32 ``[M]``; -1 is not counted.
        rules: whose counts grow.
        slots_M: int64 ``[M]``; a penalized slot stands in one row only.
    """
    if len(tokens_M):
        _count_kernel[(len(tokens_M),)](
            tokens_M, slots_M, rules.is_penalized, rules.counts, rules.counts.shape[1], num_warps=1
        )


def count_tokens_reference(
    tokens_M: torch.Tensor, rules: TokenRules, slots_M: torch.Tensor
) -> None:
    """Count as `count_tokens` does, on any device."""
    counted_M = (tokens_M >= 0) & (rules.is_penalized[slots_M] != 0)
    slots, ids = slots_M[counted_M], tokens_M[counted_M].long()
    counts = rules.counts[slots, ids]
    rules.counts[slots, ids] = torch.where((counts & MAX_COUNT) < MAX_COUNT, counts + 1, counts)


@triton.jit
def _rules_kernel(
    logits_ptr, stride_lm, slots_ptr,
    counts_ptr, is_penalized_ptr, repetition_ptr, presence_ptr, frequency_ptr,
    biases_ptr, bias_ids_ptr, bias_values_ptr,
    ends_ptr, end_ids_ptr, ends_from_ptr, position_ptr,
    is_guided_ptr, masks_ptr,
    out_ptr, stride_om,
    V, W,
    BIASES: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program changes BLOCK logits of a row."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    slot = tl.load(slots_ptr + row)
    offs = first + tl.arange(0, BLOCK)
    mask = offs < V
    x = tl.load(logits_ptr + row * stride_lm + offs, mask=mask, other=0.0).to(tl.float32)
    if tl.load(is_penalized_ptr + slot) != 0:
        counts = tl.load(counts_ptr + slot * V + offs, mask=mask, other=0).to(tl.int32)
        drawn = (counts & 0x7FFF).to(tl.float32)
        repetition = tl.load(repetition_ptr + slot)
        repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where(counts != 0, repeated, x)
        x -= tl.load(frequency_ptr + slot) * drawn
        x = tl.where(drawn > 0, x - tl.load(presence_ptr + slot), x)
    is_guided = tl.load(is_guided_ptr + slot) != 0
    if is_guided:
        words = tl.load(masks_ptr + slot * W + offs // 32, mask=mask, other=0)
        x = tl.where(((words >> (offs % 32)) & 1) != 0, x, float("-inf"))
    out_ptrs = out_ptr + row * stride_om
    tl.store(out_ptrs + offs, x, mask=mask)

    biases = tl.load(biases_ptr + slot)
    if biases > 0:
        places = tl.arange(0, BIASES)
        ids = tl.load(bias_ids_ptr + slot * BIASES + places)
        here = (places < biases) & (ids >= first) & (ids < first + BLOCK)
        # other threads wrote the tile; what a guide forbids stays at -infinity
        tl.debug_barrier()
        biased = tl.load(out_ptrs + ids, mask=here, other=0.0)
        biased += tl.load(bias_values_ptr + slot * BIASES + places, mask=here, other=0.0)
        tl.store(out_ptrs + ids, biased, mask=here)
    is_early = tl.load(position_ptr + slot) < tl.load(ends_from_ptr + slot)
    if is_early & (not is_guided):
        places = tl.arange(0, ENDS)
        ids = tl.load(end_ids_ptr + slot * ENDS + places)
        here = (places < tl.load(ends_ptr + slot)) & (ids >= first) & (ids < first + BLOCK)
        tl.debug_barrier()
        tl.store(out_ptrs + ids, tl.full((ENDS,), float("-inf"), dtype=tl.float32), mask=here)


@triton.jit
def _count_kernel(
    tokens_ptr, slots_ptr, is_penalized_ptr,
    counts_ptr,
    V,
):  # fmt: skip
    """One program counts the token of a row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    token = tl.load(tokens_ptr + row)
    if (token >= 0) & (tl.load(is_penalized_ptr + slot) != 0):
        count_ptr = counts_ptr + slot * V + token
        count = tl.load(count_ptr).to(tl.int32)
        full = (count & 0x7FFF) == 0x7FFF
        tl.store(count_ptr, tl.where(full, count, count + 1).to(tl.int16))


def _penalized(x_MV: torch.Tensor, rules: TokenRules, slots_M: torch.Tensor) -> torch.Tensor:
    """What penalties leave of logits: float32 ``[M, V]``."""
    counts_MV = rules.counts[slots_M].int()
    drawn_MV = (counts_MV & MAX_COUNT).float()
    repetition_M1 = rules.repetition[slots_M][:, None]
    repeated_MV = torch.where(x_MV > 0, x_MV / repetition_M1, x_MV * repetition_M1)
    x_MV = torch.where(counts_MV != 0, repeated_MV, x_MV)
    x_MV = x_MV - rules.frequency[slots_M][:, None] * drawn_MV
    return torch.where(drawn_MV > 0, x_MV - rules.presence[slots_M][:, None], x_MV)


def _allowed(words_W: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Which tokens a mask allows: bool ``[V]``."""
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=words_W.device)
    return ((words_W[:, None] >> bits) & 1).bool().flatten()[:vocabulary]


def _check(logits: torch.Tensor, rules: TokenRules, slots: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.is_floating_point():
        raise ValueError(
            f"need float rows of contiguous logits, got {logits.dtype} {tuple(logits.shape)}"
            f" with strides {logits.stride()}"
        )
    m, vocabulary = logits.shape
    if rules.counts.shape[1] != vocabulary:
        raise ValueError(f"rules of {rules.counts.shape[1]} tokens for {vocabulary} logits")
    if slots.shape != (m,) or slots.dtype is not torch.int64:
        raise ValueError(f"slots {slots.dtype} {tuple(slots.shape)} for {m} rows, need int64")

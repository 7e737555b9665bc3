"""`kernels.sampling` in plain torch: the same draws, found by sorting.

Shape legend: M rows, V vocabulary.
"""

import torch

from kernels.sampling import LANES, TILE, SamplingRows

__all__ = ["philox_words", "sample_tokens_reference"]

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
GREEDY_BELOW = 1e-5
MASS_UNITS = float(1 << 40)


def sample_tokens_reference(
    logits_MV: torch.Tensor,
    rows: SamplingRows,
    *,
    slots: torch.Tensor | None = None,
    advance: bool = False,
) -> torch.Tensor:
    """Draw a token for every row, on any device; see `kernels.sampling`.

    Args:
        logits_MV: float ``[M, V]``.
        rows: what every row asks for.
        slots: int64 ``[M]``, the slot of every row; None takes row i for slot i.
        advance: add one to the position of every row.

    Returns:
        int32 ``[M]``; -1 where a row cannot be drawn from.
    """
    logits_MV = logits_MV.float()
    held = rows
    if slots is not None:
        rows = SamplingRows(**{name: getattr(rows, name)[slots] for name in SamplingRows.__slots__})
    usable_M = (logits_MV < torch.inf).all(1) & (logits_MV > -torch.inf).any(1)
    scores_MV = _scores(torch.where(usable_M[:, None], logits_MV, 0.0), rows)
    top_M1 = scores_MV.amax(1, keepdim=True)
    # the first of equals
    tokens_M = (scores_MV == top_M1).to(torch.uint8).argmax(1)
    if advance:
        # what the slots of two rows become does not depend on their order
        held.position[slice(None) if slots is None else slots] = rows.position + 1
    return torch.where(usable_M, tokens_M, -1).to(torch.int32)


def _scores(logits_MV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """What the drawn token has most of: float32 ``[M, V]``."""
    greedy_M1 = (rows.temperature < GREEDY_BELOW)[:, None]
    if bool(greedy_M1.all()):
        return logits_MV
    temperature_M1 = torch.where(greedy_M1, 1.0, rows.temperature[:, None])
    scores_MV = logits_MV / temperature_M1 + _gumbel(rows, logits_MV.shape[1])
    if bool(((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)).any()):
        kept_MV = kept_tokens(logits_MV, temperature_M1, rows)
        scores_MV = scores_MV.where(kept_MV, -torch.inf)
    return torch.where(greedy_M1, logits_MV, scores_MV)


def kept_tokens(
    logits_MV: torch.Tensor, temperature_M1: torch.Tensor, rows: SamplingRows
) -> torch.Tensor:
    """Mark the tokens that top-k, then top-p, then min-p leave: bool ``[M, V]``."""
    ordered_MV, order_MV = logits_MV.sort(1, descending=True)
    k_M1 = rows.top_k[:, None].long()
    limit_M1 = torch.where(k_M1 > 0, k_M1, ordered_MV.shape[1]).clamp(max=ordered_MV.shape[1])
    kept_MV = logits_MV >= ordered_MV.gather(1, limit_M1 - 1)

    peak_M1 = ordered_MV[:, :1]
    masses_MV = (((logits_MV - peak_M1) / temperature_M1).exp() * MASS_UNITS).long()
    sums_MV = masses_MV.where(kept_MV, 0).gather(1, order_MV).cumsum(1)
    wanted_M1 = (rows.top_p[:, None].double() * sums_MV[:, -1:].double()).ceil().long()
    # the first place where the sum reaches what is wanted; ties behind it have its logit
    place_M1 = (sums_MV < wanted_M1.clamp(min=1)).sum(1, keepdim=True)
    last_M1 = ordered_MV.gather(1, place_M1.clamp(max=ordered_MV.shape[1] - 1))
    kept_MV &= (logits_MV >= last_M1) | (rows.top_p[:, None] >= 1)

    min_p_M1 = rows.min_p[:, None]
    bound_M1 = peak_M1 + temperature_M1 * min_p_M1.clamp(min=1e-30).log()
    return kept_MV & ((logits_MV >= bound_M1) | (min_p_M1 <= 0))


def philox_words(
    seed: torch.Tensor, counter: torch.Tensor, position: torch.Tensor
) -> list[torch.Tensor]:
    """Four words of Philox 4x32-10, as int64 of 0 to 2^32 - 1.

    Args:
        seed: int64, both key words.
        counter: int64, the first word of the counter.
        position: int64, the second; the others are 0.
    """
    low, high = seed & WORD, (seed >> 32) & WORD
    zero = torch.zeros_like(counter)
    a, b, c, d = counter, position & WORD, zero, zero
    for _ in range(ROUNDS):
        # int64 products wrap, and the high words are still theirs
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & WORD) ^ b ^ low,
            second & WORD,
            ((first >> 32) & WORD) ^ d ^ high,
            first & WORD,
        )
        low, high = (low + KEY_STEPS[0]) & WORD, (high + KEY_STEPS[1]) & WORD
    return [a, b, c, d]


def _gumbel(rows: SamplingRows, vocabulary: int) -> torch.Tensor:
    ids = torch.arange(vocabulary, device=rows.seed.device)
    counter_MV = (ids // TILE * LANES + ids % LANES).expand(len(rows.seed), -1)
    words = philox_words(rows.seed[:, None], counter_MV, rows.position[:, None].long())
    word_MV = torch.stack(words)
    chosen = (ids % TILE // LANES).expand(1, len(rows.seed), -1)
    u = word_MV.gather(0, chosen)[0].float() * 2.0**-32 + 2.0**-33
    near = u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    far = -(1 - u).clamp(min=1e-8).log()
    return -torch.where(u < 0.01, near, far).log()

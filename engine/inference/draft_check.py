"""Verifying guessed tokens of greedy sequences on the device.

    g[i]       the likeliest token behind the last one and i guesses, the lowest id among equals
    accepted   the most i with d[j] = g[j] for all j < i
    drawn      g[0] .. g[accepted]

So guesses change which positions are computed together, never what is likeliest at one.

Shape legend: N sequences, K guesses at most, R rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["DraftRows", "last_accepted", "likeliest_tokens"]

NO_TOKEN = -2
"""Unlike every token, and unlike the -1 of a row that cannot be drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRows:
    """Guesses of several sequences in one table."""

    rows: npt.NDArray[np.int32]
    """``[N, K + 1]``: row of g[i], the last one again behind a shorter list of guesses."""
    drafts: npt.NDArray[np.int32]
    """``[N, K]``, `NO_TOKEN` behind a shorter list."""

    @classmethod
    def of(cls, drafts: Sequence[tuple[int, ...]]) -> "DraftRows":
        """Number the rows of sequences that lie one behind the other."""
        counts = np.array([len(each) for each in drafts], dtype=np.int32)
        most = int(counts.max(initial=0))
        firsts = (counts + 1).cumsum() - counts - 1
        width = np.arange(most + 1)
        table = np.full((len(drafts), most), NO_TOKEN, dtype=np.int32)
        for row, each in zip(table, drafts, strict=True):
            row[: len(each)] = each
        rows = firsts[:, None] + np.minimum(width, counts[:, None])
        return cls(rows=rows.astype(np.int32), drafts=table)


def likeliest_tokens(logits_RV: torch.Tensor) -> torch.Tensor:  # noqa: N803  shape suffix
    """Take the likeliest token of every row.

    Args:
        logits_RV: float ``[R, V]``.

    Returns:
        int32 ``[R]``; -1 for a row with a NaN or an infinite maximum.
    """
    largest, tokens = logits_RV.max(dim=-1)
    # one NaN among the terms is a NaN of the sum
    can_draw = torch.isfinite(largest) & ~logits_RV.sum(dim=-1, dtype=torch.float32).isnan()
    return torch.where(can_draw, tokens, -1).to(torch.int32)


def last_accepted(
    likeliest: torch.Tensor, rows: torch.Tensor, drafts: torch.Tensor
) -> torch.Tensor:
    """Find the last token that a sequence won.

    Args:
        likeliest: int32 ``[R]``.
        rows: int64 ``[N, K + 1]``, see `DraftRows`.
        drafts: int32 ``[N, K]``.

    Returns:
        int32 ``[N]``.
    """
    found = likeliest[rows]
    accepted = (found[:, :-1] == drafts).int().cumprod(dim=1).sum(dim=1, keepdim=True)
    return found.gather(1, accepted).squeeze(1)

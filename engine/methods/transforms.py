"""Learnable equivalent transformation (OmniQuant section 3.3; ABQ-LLM adds up -> down).

For every pair of a producer and the consumers of its channels, a factor s (and, where the producer
has a bias, a shift d) moves from one to the other and leaves the layer's function as it is:

    producer    weight / s,  bias (b - d) / s          consumers   columns * s,  bias b + W d
    queries     rows / s                               keys        rows * s

s = exp(u), so it stays positive. The start is SmoothQuant's

    s = max|x|^alpha / max|w|^(1 - alpha)              alpha = 1/2, max|w| over all consumers

with max|x| of what is left after the shift to the middle of each channel's range. Factors of
queries and keys start at 1 and are shared by the two channels of a rotary pair, so that rotation
and scaling commute, and by the query heads of a key-value group.

Shape legend: C channels of a pair, N outputs, K inputs, D dimensions of a head.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from typing_extensions import override

from engine.families.base import ChannelPair, NormKind, QueryKeyPair
from engine.methods.base import ChannelStatistics

__all__ = [
    "ColumnFactor",
    "FactoredNorm",
    "HeadFactor",
    "PairFactor",
    "RowFactor",
    "fold_norm",
    "start_factor",
]

ALPHA = 0.5
MIN_FACTOR, MAX_FACTOR = 1e-4, 1e4
MIN_PEAK = 1e-5


class PairFactor(nn.Module):
    """The factor and the shift of one pair, by producer channel."""

    def __init__(self, start_C: torch.Tensor, shift_C: torch.Tensor | None) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(start_C.log())
        self.shift = None if shift_C is None else nn.Parameter(shift_C.clone())

    @override
    def forward(self) -> torch.Tensor:
        """The factor: float32 ``[C]``, positive."""
        return self.log_factor.exp()


class HeadFactor(nn.Module):
    """The factor of queries and keys: one value for each rotary pair of a key-value head."""

    def __init__(self, pair: QueryKeyPair, device: torch.device, *, shared: bool) -> None:
        super().__init__()
        self._half, self._rest = pair.rotary_dim // 2, pair.head_dim - pair.rotary_dim
        heads = 1 if shared else pair.kv_heads
        self.log_factor = nn.Parameter(torch.zeros(heads, self._half + self._rest, device=device))

    @override
    def forward(self) -> torch.Tensor:
        """The factor by head and channel: float32 ``[heads, D]``."""
        halves, rest = self.log_factor[:, : self._half], self.log_factor[:, self._half :]
        return torch.cat([halves, halves, rest], dim=1).exp()


class ColumnFactor(nn.Module):
    """What a consumer's weight takes: ``W * s`` and ``b + W d``."""

    def __init__(self, factor: PairFactor, pair: ChannelPair) -> None:
        super().__init__()
        self.factor = factor
        self._repeats, self._head_dim = pair.repeats, pair.head_dim

    @override
    def forward(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Change ``[N, K]`` and ``[N]``."""
        if self.factor.shift is not None:
            moved = weight.float() @ self._spread(self.factor.shift)
            bias = moved if bias is None else bias + moved
        return weight * self._spread(self.factor()), bias

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What an input of the source's layer has become: ``(x - d) / s`` of ``[..., K]``."""
        shift = self.factor.shift
        moved = x if shift is None else x - self._spread(shift)
        return moved / self._spread(self.factor())

    def _spread(self, value_C: torch.Tensor) -> torch.Tensor:
        """Repeat a key-value head's channels for every query head that reads it."""
        if self._repeats == 1 or self._head_dim is None:
            return value_C
        heads = value_C.view(-1, 1, self._head_dim)
        return heads.expand(-1, self._repeats, -1).reshape(-1)


class RowFactor(nn.Module):
    """What a producing linear's weight takes: ``W / s`` and ``(b - d) / s`` in its rows."""

    def __init__(self, factor: nn.Module, rows: torch.Tensor, repeats: int = 1, power: int = -1):
        super().__init__()
        self.factor = factor
        self.register_buffer("rows", rows)
        self._repeats, self._power = repeats, power

    @override
    def forward(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Change ``[N, K]`` and ``[N]``."""
        rows = cast("torch.Tensor", self.rows)
        factor: torch.Tensor = self.factor()
        if self._repeats > 1:
            factor = factor.repeat_interleave(self._repeats, dim=0)
        taken_C = factor.reshape(-1) ** self._power
        ones_N = torch.ones(weight.shape[0], device=weight.device)
        factor_N = ones_N.index_copy(0, rows, taken_C)
        shift = getattr(self.factor, "shift", None)
        if bias is not None and shift is not None:
            bias = bias - torch.zeros_like(ones_N).index_copy(0, rows, shift)
        return weight * factor_N.unsqueeze(1), None if bias is None else bias * factor_N

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs stay as they are."""
        return x


class FactoredNorm(nn.Module):
    """A norm whose output takes the inverse factor: ``(norm(x) - d) / s``."""

    def __init__(self, norm: nn.Module, factor: nn.Module, power: int = -1) -> None:
        super().__init__()
        self.norm = norm
        self.factor = factor
        self._power = power

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize ``[..., C]``."""
        out: torch.Tensor = self.norm(x)
        shift = getattr(self.factor, "shift", None)
        if shift is not None:
            out = out - shift
        return out * self.taken()

    def taken(self) -> torch.Tensor:
        """What the norm's weight is multiplied by: float32 ``[C]``."""
        factor: torch.Tensor = self.factor()
        return factor.reshape(-1) ** self._power


@torch.no_grad()
def fold_norm(factored: FactoredNorm, kind: NormKind) -> nn.Module:
    """Write a factor into the norm's own weight and bias; return the norm."""
    norm, taken_C = factored.norm, factored.taken()
    weight = cast("torch.Tensor", norm.weight).float()
    plus = 1.0 if kind is NormKind.RMS_PLUS_ONE else 0.0
    norm.weight = nn.Parameter((weight + plus) * taken_C - plus, requires_grad=False)
    shift = getattr(factored.factor, "shift", None)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        moved = bias.float() if shift is None else bias.float() - shift
        norm.bias = nn.Parameter(moved * taken_C, requires_grad=False)
    return norm


def start_factor(
    pair: ChannelPair,
    statistics: ChannelStatistics,
    weights: Mapping[str, torch.Tensor],
    *,
    shifts: bool,
) -> PairFactor:
    """Make the factor of a pair at SmoothQuant's start.

    Args:
        pair: the pair.
        statistics: of the consumers' inputs, by input channel.
        weights: the consumers', float ``[N, K]`` by name.
        shifts: whether the producer has a bias that can take a shift.
    """
    # one shift for all heads that read a channel: the middle of what they are given together
    low_C, high_C = -_by_channel(-statistics.low, pair), _by_channel(statistics.high, pair)
    shift_C = (low_C + high_C) / 2 if shifts else torch.zeros_like(low_C)
    peak_C = torch.maximum(high_C - shift_C, shift_C - low_C)
    widest_K = torch.stack([weights[name].abs().amax(0) for name in pair.consumers]).amax(0)
    widest_C = _by_channel(widest_K.float(), pair)
    start_C = peak_C.clamp(min=MIN_PEAK) ** ALPHA / widest_C.clamp(min=MIN_PEAK) ** (1 - ALPHA)
    # nothing is known of a channel that was never heard, or of an expert that no token reached
    start_C = torch.where(peak_C > 0, start_C, 1.0).clamp(MIN_FACTOR, MAX_FACTOR)
    return PairFactor(start_C, shift_C if shifts else None)


def _by_channel(value_K: torch.Tensor, pair: ChannelPair) -> torch.Tensor:
    """Take the largest over the query heads that read one producer channel."""
    if pair.repeats == 1 or pair.head_dim is None:
        return value_K
    return value_K.view(-1, pair.repeats, pair.head_dim).amax(1).reshape(-1)

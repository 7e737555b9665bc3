"""The key-value cache of one request, at full precision or quantized.

A quantized cache holds, for every token and head, codes over the head's dimensions with one
float32 scale and one zero-point (formula: `kernels.activation_quant`). Keys arrive after rotary
embedding. What is returned to attention is always what the codes stand for, also for the tokens
just appended, so calibration, evaluation and generation see the same values.

Shape legend: B sequences, H key-value heads, T tokens, D dimensions of a head.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from typing_extensions import override

from engine.spec import FULL_BITS
from kernels.activation_quant import (
    QuantizedActivations,
    dequantize_activations,
    quantize_activations,
)

__all__ = ["QuantizedCache", "QuantizedStates", "make_cache"]


def make_cache(layers: int, kv_bits: int) -> Cache:
    """Make an empty cache.

    Args:
        layers: decoder layers of the model.
        kv_bits: 2..8, or 16 for no quantization.
    """
    return DynamicCache() if kv_bits == FULL_BITS else QuantizedCache(layers, kv_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedStates:
    """Keys or values of some tokens."""

    codes: torch.Tensor
    """uint8 ``[B, H, T, D]``."""
    scale: torch.Tensor
    """float32 ``[B, H, T, 1]``."""
    zero_point: torch.Tensor
    """uint8 ``[B, H, T, 1]``, itself a code."""
    bits: int

    @classmethod
    def from_states(cls, states: torch.Tensor, bits: int) -> Self:
        """Quantize float ``[B, H, T, D]``."""
        rows = quantize_activations(states.detach().reshape(-1, states.shape[-1]), bits)
        per_token = (*states.shape[:-1], 1)
        return cls(
            codes=rows.codes.view(states.shape),
            scale=rows.scale.view(per_token),
            zero_point=rows.zero_point.to(torch.uint8).view(per_token),
            bits=bits,
        )

    def followed_by(self, later: Self) -> Self:
        """Append later tokens."""
        return type(self)(
            codes=torch.cat([self.codes, later.codes], dim=2),
            scale=torch.cat([self.scale, later.scale], dim=2),
            zero_point=torch.cat([self.zero_point, later.zero_point], dim=2),
            bits=self.bits,
        )

    def select(self, rows: torch.Tensor) -> Self:
        """Keep some sequences, in the given order."""
        return type(self)(
            codes=self.codes[rows],
            scale=self.scale[rows],
            zero_point=self.zero_point[rows],
            bits=self.bits,
        )

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """What the codes stand for: ``[B, H, T, D]``."""
        rows = QuantizedActivations(
            codes=self.codes, scale=self.scale, zero_point=self.zero_point.int(), bits=self.bits
        )
        return dequantize_activations(rows).to(dtype)


class QuantizedCache(Cache):
    """A cache whose layers quantize keys and values when they are appended.

    Gradients pass straight through to the tokens just appended.
    """

    def __init__(self, layers: int, bits: int) -> None:
        super().__init__(layers=[_QuantizedLayer(bits) for _ in range(layers)])


class _QuantizedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # as transformers has it
    """Keys and values of one decoder layer."""

    # a sliding window is left to the mask: old tokens stay stored
    is_sliding = False

    def __init__(self, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.bits = bits
        self.stored_keys: QuantizedStates | None = None
        self.stored_values: QuantizedStates | None = None

    @override
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    @override
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.lazy_initialization(key_states, value_states)
        self.stored_keys = self._append(self.stored_keys, key_states)
        self.stored_values = self._append(self.stored_values, value_states)
        return (
            _straight_through(self.stored_keys.dequantized(key_states.dtype), key_states),
            _straight_through(self.stored_values.dequantized(value_states.dtype), value_states),
        )

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @override
    def get_seq_length(self) -> int:
        return 0 if self.stored_keys is None else self.stored_keys.codes.shape[2]

    @override
    def get_max_length(self) -> int:
        return -1

    @override
    def reset(self) -> None:
        self.stored_keys = self.stored_values = None
        self.is_initialized = False

    @override
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.stored_keys is not None and self.stored_values is not None:
            self.stored_keys = self.stored_keys.select(beam_idx)
            self.stored_values = self.stored_values.select(beam_idx)

    def _append(self, stored: QuantizedStates | None, states: torch.Tensor) -> QuantizedStates:
        new = QuantizedStates.from_states(states, self.bits)
        return new if stored is None else stored.followed_by(new)


def _straight_through(dequantized: torch.Tensor, appended: torch.Tensor) -> torch.Tensor:
    if not appended.requires_grad:
        return dequantized
    earlier = dequantized.shape[2] - appended.shape[2]
    through = dequantized[:, :, earlier:] + (appended - appended.detach())
    return torch.cat([dequantized[:, :, :earlier], through], dim=2)

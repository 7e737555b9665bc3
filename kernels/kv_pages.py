"""The paged key-value cache of one decoder layer, at 16 bits or quantized.

    x ~ (code - zero_point) * scale        per token and key-value head (`kernels.activation_quant`)

Layout: a code takes a field of F = 2, 4 or 8 bits, the narrowest that holds it. Byte j of a row
holds in its bits [F i, F i + F) the code of dim j + i C, for i = 0 .. 8/F - 1. A slot is
page * T + offset; the T keys of a page and a head lie next to each other, its T values behind them.
The two zero-points of a token share a half word, for the smallest copy that is asynchronous takes
four bytes: it brings those of two tokens.

Shape legend: H key-value heads, D dims of a head, P pages of T tokens, C = D F / 8 bytes of a row.
"""

from dataclasses import dataclass
from typing import Self

import torch

from kernels.activation_quant import QuantizedActivations, dequantize_activations

__all__ = ["RAW_BITS", "KvPages", "field_bits", "pack_fields", "unpack_fields"]

RAW_BITS = 16
MIN_PAGE = 16
RAW_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPages:
    """Keys and values of one layer."""

    codes: torch.Tensor
    """uint8 ``[P, H, 2, T, C]``, or at 16 bits float16 or bfloat16 ``[P, H, 2, T, D]``."""
    scale: torch.Tensor
    """float32 ``[P, H, 2, T]``; empty at 16 bits."""
    zero_point: torch.Tensor
    """uint8 ``[P, H, T, 2]``, itself a code; empty at 16 bits."""
    bits: int
    """2..8, or 16."""
    head_dim: int

    @classmethod
    def allocate(
        cls,
        pages: int,
        kv_heads: int,
        head_dim: int,
        *,
        bits: int,
        page_size: int = MIN_PAGE,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Allocate zeroed pages; ``dtype`` matters at 16 bits only.

        Raises:
            ValueError: if bits, page size, head size or dtype cannot be stored.
        """
        _check_geometry(head_dim, bits, page_size, dtype)
        return cls.zeros(
            pages, kv_heads, head_dim, bits=bits, page_size=page_size, dtype=dtype, device=device
        )

    @classmethod
    def zeros(
        cls,
        pages: int,
        kv_heads: int,
        head_dim: int,
        *,
        bits: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Allocate pages that plain torch can read, whatever the kernels of a GPU want."""
        rows = (pages, kv_heads, 2, page_size)
        raw = bits == RAW_BITS
        width = head_dim if raw else head_dim * field_bits(bits) // 8
        return cls(
            codes=torch.zeros((*rows, width), dtype=dtype if raw else torch.uint8, device=device),
            scale=torch.zeros((0,) if raw else rows, dtype=torch.float32, device=device),
            zero_point=torch.zeros(
                (0,) if raw else (pages, kv_heads, page_size, 2), dtype=torch.uint8, device=device
            ),
            bits=bits,
            head_dim=head_dim,
        )

    @property
    def kv_heads(self) -> int:
        """H."""
        return self.codes.shape[1]

    @property
    def page_size(self) -> int:
        """T."""
        return self.codes.shape[3]

    @property
    def bytes_per_token(self) -> int:
        """What one token takes in this layer: codes, scales and zero-points of all heads."""
        tensors = (self.codes, self.scale, self.zero_point)
        return sum(t.numel() * t.element_size() for t in tensors) // (
            self.codes.shape[0] * self.page_size
        )

    def stored(self, slots: torch.Tensor) -> torch.Tensor:
        """Read back what slots stand for: float32 ``[2, H, tokens, D]``, keys before values.

        Args:
            slots: integers ``[tokens]``, none negative.
        """
        page, offset = slots.long() // self.page_size, slots.long() % self.page_size
        rows = self.codes[page, :, :, offset]
        if self.bits == RAW_BITS:
            return rows.float().permute(2, 1, 0, 3)
        states = dequantize_activations(
            QuantizedActivations(
                codes=unpack_fields(rows, field_bits(self.bits)),
                scale=self.scale[page, :, :, offset].unsqueeze(-1),
                zero_point=self.zero_point[page, :, offset].int().unsqueeze(-1),
                bits=self.bits,
            )
        )
        return states.permute(2, 1, 0, 3)


def field_bits(bits: int) -> int:
    """Give the bits that a code of 2..8 bits takes: 2, 4 or 8."""
    return next(field for field in (2, 4, 8) if bits <= field)


def pack_fields(codes: torch.Tensor, field: int) -> torch.Tensor:
    """Pack uint8 ``[..., D]`` into bytes ``[..., D * field / 8]``."""
    fields = codes.view(*codes.shape[:-1], 8 // field, -1).int()
    shifts = torch.arange(0, 8, field, device=codes.device).unsqueeze(-1)
    return (fields << shifts).sum(-2).to(torch.uint8)


def unpack_fields(packed: torch.Tensor, field: int) -> torch.Tensor:
    """Unpack bytes ``[..., D * field / 8]`` into uint8 ``[..., D]``."""
    shifts = torch.arange(0, 8, field, device=packed.device).unsqueeze(-1)
    fields = (packed.int().unsqueeze(-2) >> shifts) & ((1 << field) - 1)
    return fields.flatten(-2).to(torch.uint8)


def _check_geometry(head_dim: int, bits: int, page_size: int, dtype: torch.dtype) -> None:
    if bits != RAW_BITS and not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, or 16, got {bits}")
    if bits == RAW_BITS and dtype not in RAW_DTYPES:
        raise ValueError(f"dtype must be float16 or bfloat16 at 16 bits, got {dtype}")
    if page_size < MIN_PAGE or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two from {MIN_PAGE} on, got {page_size}")
    if head_dim % 16 or not 64 <= head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 16 from 64 to 256, got {head_dim}")

"""Appending to the paged key-value cache: normalize, rotate, quantize and write in one launch.

    low, high  = min(min_d x, 0), max(max_d x, 0)          per token and key-value head, float32
    scale      = max((high - low) / (2^bits - 1), 1e-5)    x ~ (code - zero_point) * scale
    zero_point = round(-low / scale)                       rounding half to even
    code       = clamp(round(x / scale) + zero_point, 0, 2^bits - 1)

This is `kernels.activation_quant` bit for bit, NaN scales included; at 16 bits states are stored as
they are. Keys are quantized after their rotary embedding, whose products and sum are each rounded
to the dtype of the states, as the modules of a decoder round them:

    y_d = x_d cos_d -+ x_{d +- R/2} sin_d                  - in the first half of R dims, + after it

Where heads of queries and keys have an RMS norm, it comes first: that of `kernels.layer_math`, bit
for bit.

Shape legend: M tokens, Q query heads, H key-value heads, D dims of a head, R of them rotated,
T tokens of a page.
"""

from dataclasses import dataclass

import torch
import triton

from kernels._kv_append_kernel import append_kv_kernel
from kernels.activation_quant import MIN_ACTIVATION_SCALE, quantize_activations
from kernels.kv_pages import RAW_BITS, KvPages, field_bits, pack_fields
from kernels.layer_math import Norm, NormKind, apply_norm

__all__ = [
    "HeadNorms",
    "HeadStates",
    "LaunchConfig",
    "Rotary",
    "append_kv",
    "append_kv_reference",
    "select_config",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStates:
    """What the query-key-value product gave for M tokens: views with adjacent dims will do."""

    query: torch.Tensor | None
    """``[M, Q, D]``; None where there is nothing to rotate."""
    key: torch.Tensor
    """float16, bfloat16 or float32 ``[M, H, D]``."""
    value: torch.Tensor
    """As ``key``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary embedding as a table of angles; frequency scaling is in the table."""

    cos: torch.Tensor
    """float32 ``[positions, R / 2]``, rows adjacent."""
    sin: torch.Tensor
    """As ``cos``."""
    positions: torch.Tensor
    """int32 or int64 ``[M]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """RMS norms of one kind over the D dims of a head, shared by all heads."""

    query: Norm
    key: Norm

    def __post_init__(self) -> None:
        if self.query.kind is NormKind.LAYER or self.query.kind is not self.key.kind:
            raise ValueError(f"need RMS norms of one kind, got {self.query.kind}, {self.key.kind}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Heads of one program, and its warps."""

    block_heads: int
    num_warps: int
    launch_pdl: bool = False
    """Start while the kernel before still runs (programmatic dependent launch)."""


def select_config(
    tokens: int, heads: int, table: dict[int, LaunchConfig] | None = None
) -> LaunchConfig:
    """Pick the launch for a number of tokens; not measured.

    One token has to spread over many programs, many tokens are spread anyway.

    Args:
        tokens: M.
        heads: H.
        table: measured configs by the least number of tokens they are for.
    """
    fitting = [tokens_from for tokens_from in table or {} if tokens_from <= tokens]
    if table and fitting:
        return table[max(fitting)]
    block_heads = min(triton.next_power_of_2(heads), 2 if tokens < 64 else 8)
    return LaunchConfig(block_heads=block_heads, num_warps=max(1, block_heads // 2))


def append_kv(
    pages: KvPages,
    states: HeadStates,
    slots: torch.Tensor,
    rotary: Rotary | None = None,
    *,
    norms: HeadNorms | None = None,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor | None:
    """Turn queries and keys, quantize keys and values and write them: one launch on a GPU.

    Args:
        pages: written in place.
        states: M tokens.
        slots: int32 or int64 ``[M]``; a negative slot writes nothing.
        rotary: None does not rotate.
        norms: of the heads, before they rotate; None for none.
        out: for the new queries, ``[M, Q, D]`` like them, not the same memory.
        config: None for `select_config`.

    Returns:
        The normalized and rotated queries, or what was given where nothing changes them.

    Raises:
        ValueError: if the shapes or the devices do not fit each other.
    """
    _check_states(pages, states, slots, rotary)
    if pages.codes.device.type == "cpu":
        return append_kv_reference(pages, states, slots, rotary, norms=norms, out=out)
    return launch_append_kv(pages, states, slots, rotary, norms=norms, out=out, config=config)


def launch_append_kv(
    pages: KvPages,
    states: HeadStates,
    slots: torch.Tensor,
    rotary: Rotary | None = None,
    *,
    norms: HeadNorms | None = None,
    out: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor | None:
    """Run the Triton kernel, on a GPU or in the interpreter; see `append_kv`."""
    query, key, value = states.query, states.key, states.value
    config = config or select_config(key.shape[0], pages.kv_heads)
    source, target, query_blocks = key, key, 0
    if query is not None and (rotary is not None or norms is not None):
        source, target = query, query.new_empty(query.shape) if out is None else out
        query_blocks = -(-query.shape[1] // config.block_heads)
    kv_blocks = -(-pages.kv_heads // config.block_heads)
    field = RAW_BITS if pages.bits == RAW_BITS else field_bits(pages.bits)
    width = pages.codes.shape[-1]
    interpreted = key.device.type == "cpu"
    if key.shape[0]:
        append_kv_kernel[(key.shape[0], query_blocks + 2 * kv_blocks)](
            source, source.stride(0), source.stride(1),
            key, key.stride(0), key.stride(1),
            value, value.stride(0), value.stride(1),
            rotary.cos if rotary else key, rotary.sin if rotary else key,
            rotary.positions if rotary else slots,
            norms.query.weight if norms else key, norms.key.weight if norms else key,
            norms.query.eps if norms else 0.0, norms.key.eps if norms else 0.0,
            slots,
            target, target.stride(0), target.stride(1),
            pages.codes, pages.scale, pages.zero_point,
            source.shape[1], query_blocks, kv_blocks,
            KV_HEADS=pages.kv_heads,
            PAGE=pages.page_size,
            BITS=pages.bits,
            FIELD=field,
            WIDTH=width,
            ROTATED=2 * rotary.cos.shape[1] if rotary else 0,
            NORM="none" if norms is None else str(norms.query.kind),
            MIN_SCALE=MIN_ACTIVATION_SCALE,
            BLOCK_H=config.block_heads,
            BLOCK_C=triton.next_power_of_2(width),
            BLOCK_D=triton.next_power_of_2(pages.head_dim),
            PDL=config.launch_pdl and not interpreted,
            INTERP=interpreted,
            num_warps=config.num_warps,
            # a fused product and sum would round otherwise than the reference does
            enable_fp_fusion=False,
            **({"launch_pdl": True} if config.launch_pdl else {}),
        )  # fmt: skip
    return target if query_blocks else query


def append_kv_reference(
    pages: KvPages,
    states: HeadStates,
    slots: torch.Tensor,
    rotary: Rotary | None = None,
    *,
    norms: HeadNorms | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Compute `append_kv` in plain torch on any device."""
    query, key = states.query, states.key
    if norms is not None:
        key = apply_norm(key, norms.key)
        query = None if query is None else apply_norm(query, norms.query)
    if rotary is not None:
        key = _rotate(key, rotary)
        query = None if query is None else _rotate(query, rotary)
    if out is not None and query is not None and query is not states.query:
        query = out.copy_(query)
    kept = slots >= 0
    page, offset = slots[kept].long() // pages.page_size, slots[kept].long() % pages.page_size
    rows = torch.stack([key, states.value], dim=2)[kept].detach()
    if pages.bits == RAW_BITS:
        pages.codes[page, :, :, offset] = rows.to(pages.codes.dtype)
        return query
    quantized = quantize_activations(rows.reshape(-1, pages.head_dim), pages.bits)
    packed = pack_fields(quantized.codes, field_bits(pages.bits))
    pages.codes[page, :, :, offset] = packed.view(*rows.shape[:3], -1)
    pages.scale[page, :, :, offset] = quantized.scale.view(rows.shape[:3])
    zero_point = quantized.zero_point.view(rows.shape[:3])
    pages.zero_point[page, :, offset] = zero_point.to(torch.uint8)
    return query


def _rotate(x_MHD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    half = rotary.cos.shape[1]
    cos = rotary.cos[rotary.positions.long()].to(x_MHD.dtype).unsqueeze(1)
    sin = rotary.sin[rotary.positions.long()].to(x_MHD.dtype).unsqueeze(1)
    first, second, rest = x_MHD.tensor_split((half, 2 * half), dim=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(turned, dim=-1)


def _check_states(
    pages: KvPages, states: HeadStates, slots: torch.Tensor, rotary: Rotary | None
) -> None:
    key, value = states.key, states.value
    expected = (slots.shape[0], pages.kv_heads, pages.head_dim)
    if key.shape != expected or value.shape != expected:
        raise ValueError(
            f"key and value must be {expected}, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        raise ValueError("the dims of a head must be adjacent")
    if rotary is not None and not (rotary.cos.is_contiguous() and rotary.sin.is_contiguous()):
        raise ValueError("the rows of cos and sin must be adjacent")
    if rotary is not None and 2 * rotary.cos.shape[1] > pages.head_dim:
        raise ValueError(f"{2 * rotary.cos.shape[1]} rotated dims do not fit {pages.head_dim}")
    if key.device != pages.codes.device or slots.device != key.device:
        raise ValueError(f"states are on {key.device}, pages on {pages.codes.device}")

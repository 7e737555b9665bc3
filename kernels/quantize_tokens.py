"""Quantized tokens on a GPU, fused with what precedes them: a norm, a gate or nothing.

    plain     codes of x
    normed    codes of norm(x), or of norm(residual + x), which also gives the sum
    gated     codes of gate(x[:, :I]) * x[:, I:]

One launch, one program a token, or several where few tokens are gated (`kernels._token_kernel`).
Norms and gates are those of `kernels.layer_math`, rounded to the dtype of x, and codes those of
`kernels.activation_quant` in the form of `kernels.tokens`; the references below compose them, and
the kernel gives their bits.

Shape legend: M tokens, K features, S groups, L columns, I features of a gate.
"""

from dataclasses import dataclass

import torch

from kernels._token_kernel import token_kernel
from kernels.activation_quant import MAX_BITS, MIN_BITS, quantize_activations
from kernels.layer_math import Gate, Norm, add_and_normalize, apply_gate, apply_norm
from kernels.overlap import can_overlap
from kernels.token_parts import (
    parts_that_fit,
    register_options,
    runs_to_meet,
    share_of,
    slots_of,
)
from kernels.tokens import TokenCodes

__all__ = [
    "FEW_TOKENS",
    "MAX_FEATURES",
    "Launch",
    "LaunchConfig",
    "NormedTokens",
    "TokenForm",
    "code_tokens",
    "halves",
    "launch_tokens",
    "new_tokens",
    "quantize_gated",
    "quantize_gated_reference",
    "quantize_normed",
    "quantize_normed_reference",
    "quantize_tokens",
    "quantize_tokens_reference",
    "row_block",
    "select_config",
]

MAX_FEATURES = 32768
NARROW = 2048
FEW_TOKENS = 32
"""Up to which starting early helps."""
SHARED_TOKENS = 8
"""Up to which a gated token is shared by several programs."""
SHARE = 1024
"""Columns of a share, at least."""
WARP_VALUES = 256
"""8 values a thread: 16 bytes."""
MOST_SHARES = 16
"""More would meet later and have little left to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenForm:
    """The form in which the next product reads its tokens."""

    bits: int
    """2..8."""
    groups: int = 1
    """S; where above 1, a group is a power of two features."""
    columns: int | None = None
    """L, at least K; None takes K."""

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits = {self.bits}, need {MIN_BITS} to {MAX_BITS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedTokens:
    """What a norm in front of a quantized layer gives."""

    tokens: TokenCodes
    residual: torch.Tensor
    """``[M, K]``: the sum that was normalized; x itself where there was nothing to add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How a token is launched; every choice but `native_exp` gives the same bits."""

    num_warps: int
    rapid_division: bool = True
    """Divide by corrected reciprocals instead of the division of the instruction set."""
    native_exp: bool = False
    """Take the hardware's exponential for gates: faster, a few float32 units from the reference."""
    launch_pdl: bool = False
    """Start while the kernel before still runs (programmatic dependent launch)."""
    parts: int = 1
    """Programs that share a gated token, a power of two up to 32."""


def select_config(
    columns: int,
    table: dict[int, LaunchConfig] | None = None,
    *,
    m: int = 1,
    gated: bool = False,
) -> LaunchConfig:
    """Pick the launch for M rows of `columns`, a power of two; `gated` where parts may share one.

    Measured on an H100: eight warps are best or within 5 % of it from 4096 columns on, and starting
    early takes 0.4 us off few tokens; from 64 tokens on programs that wait are in the way of those
    that work. A table of measured choices, by columns, comes first.

    A gate of 11008 features takes one program of eight warps 4.5 us, 16 parts of four warps 2.1;
    one of 28672 takes 9.0 and 2.5. One program takes 1.9 us and 0.26 us for every 1024 features,
    so parts pay from 4096 on.
    """
    if table is not None and columns in table:
        return table[columns]
    early = m <= FEW_TOKENS
    if gated and m <= SHARED_TOKENS and columns > 4 * SHARE:
        parts = min(MOST_SHARES, columns // SHARE)
        warps = min(8, columns // parts // WARP_VALUES)
        return LaunchConfig(num_warps=warps, launch_pdl=early, parts=parts)
    return LaunchConfig(num_warps=8 if columns > NARROW else 4, launch_pdl=early)


def quantize_tokens(
    x_MK: torch.Tensor,
    form: TokenForm,
    *,
    out: TokenCodes | None = None,
    config: LaunchConfig | None = None,
) -> TokenCodes:
    """Quantize tokens as they are.

    Args:
        x_MK: float16, bfloat16 or float32 ``[M, K]``, K <= 32768, features contiguous.
        form: what to write.
        out: written to and returned; None allocates.
        config: None takes `select_config`.

    Raises:
        ValueError: if the form or a layout does not fit K.
    """
    tokens = new_tokens(x_MK, x_MK.shape[1], form, out)
    launch_tokens(Launch(x=x_MK, features=x_MK.shape[1], tokens=tokens), config)
    return tokens


def code_tokens(x_MK: torch.Tensor, form: TokenForm) -> TokenCodes:
    """Quantize tokens where they are: by the kernel on a GPU, in plain torch on a CPU."""
    on_cpu = x_MK.device.type == "cpu"
    return (quantize_tokens_reference if on_cpu else quantize_tokens)(x_MK, form)


def quantize_tokens_reference(x_MK: torch.Tensor, form: TokenForm) -> TokenCodes:
    """Compute `quantize_tokens` in plain torch on any device."""
    return TokenCodes.from_activations(
        quantize_activations(x_MK, form.bits), groups=form.groups, columns=form.columns
    )


def quantize_normed(
    x_MK: torch.Tensor,
    norm: Norm,
    form: TokenForm,
    *,
    residual: torch.Tensor | None = None,
    out: NormedTokens | None = None,
    config: LaunchConfig | None = None,
) -> NormedTokens:
    """Add to the residual stream, normalize and quantize.

    Args:
        x_MK: float16, bfloat16 or float32 ``[M, K]``, K <= 32768, features contiguous.
        norm: of K features.
        form: what to write.
        residual: like `x_MK`, or None where x is the stream itself.
        out: written to and returned; its residual may be `residual`. None allocates.
        config: None takes `select_config`.

    Raises:
        ValueError: if the form, the norm or a layout does not fit K.
    """
    total = x_MK if residual is None else torch.empty_like(x_MK) if out is None else out.residual
    tokens = new_tokens(x_MK, x_MK.shape[1], form, None if out is None else out.tokens)
    launch = Launch(
        x=x_MK, features=x_MK.shape[1], tokens=tokens, step=norm, residual=residual, total=total
    )
    launch_tokens(launch, config)
    return NormedTokens(tokens=tokens, residual=total)


def quantize_normed_reference(
    x_MK: torch.Tensor, norm: Norm, form: TokenForm, *, residual: torch.Tensor | None = None
) -> NormedTokens:
    """Compute `quantize_normed` in plain torch on any device."""
    if residual is None:
        normed, total = apply_norm(x_MK, norm), x_MK
    else:
        normed, total = add_and_normalize(x_MK, residual, norm)
    return NormedTokens(tokens=quantize_tokens_reference(normed, form), residual=total)


def quantize_gated(
    gate_up: torch.Tensor,
    gate: Gate,
    form: TokenForm,
    *,
    out: TokenCodes | None = None,
    config: LaunchConfig | None = None,
    slots: torch.Tensor | None = None,
) -> TokenCodes:
    """Gate and quantize the input of a down projection.

    Args:
        gate_up: float16, bfloat16 or float32 ``[M, 2 I]``, gates first, I <= 32768, contiguous
            along features.
        gate: the gate.
        form: what to write, with K = I.
        out: written to and returned; None allocates.
        config: None takes `select_config`.
        slots: from `kernels.token_parts.make_slots`, for every gate of one stream; without them
            one program takes a token.

    Raises:
        ValueError: if the form, a layout or the parts do not fit I.
    """
    features = halves(gate_up)
    tokens = new_tokens(gate_up, features, form, out)
    launch = Launch(x=gate_up, features=features, tokens=tokens, step=gate, slots=slots)
    launch_tokens(launch, config)
    return tokens


def quantize_gated_reference(gate_up: torch.Tensor, gate: Gate, form: TokenForm) -> TokenCodes:
    """Compute `quantize_gated` in plain torch on any device."""
    return quantize_tokens_reference(apply_gate(gate_up, gate), form)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of the kernel; either `tokens` or `values` is written."""

    x: torch.Tensor
    features: int
    step: Norm | Gate | None = None
    residual: torch.Tensor | None = None
    total: torch.Tensor | None = None
    tokens: TokenCodes | None = None
    values: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    """Where the parts of a gated token meet."""

    @property
    def prologue(self) -> str:
        """The kernel's name of the step."""
        if self.step is None:
            return "plain"
        return str(self.step.kind if isinstance(self.step, Norm) else self.step)

    def __post_init__(self) -> None:
        sides = [each for each in (self.residual, self.total) if each is not None]
        for each in (self.x, *sides):
            if each.dim() != 2 or each.stride(1) != 1 or each.dtype != self.x.dtype:
                raise ValueError(
                    f"need rows of contiguous {self.x.dtype} features, got {each.dtype}"
                    f" {tuple(each.shape)} with strides {each.stride()}"
                )
        if any(each.shape != self.x.shape for each in sides):
            raise ValueError(f"x is {tuple(self.x.shape)}, residual {tuple(sides[0].shape)}")
        if not 1 <= self.features <= MAX_FEATURES:
            raise ValueError(f"{self.features} features, need 1 to {MAX_FEATURES}")
        if isinstance(self.step, Norm) and self.step.weight.shape != (self.features,):
            raise ValueError(
                f"a norm of {tuple(self.step.weight.shape)} on {self.features} features"
            )


def launch_tokens(launch: Launch, config: LaunchConfig | None = None) -> None:
    """Run the kernel on a GPU or in the interpreter."""
    x, tokens, step = launch.x, launch.tokens, launch.step
    out = tokens.codes if tokens is not None else launch.values
    assert out is not None, "a launch writes codes or values"
    if not len(x):
        return
    norm = step if isinstance(step, Norm) else None
    columns = out.shape[1]
    block = row_block(max(launch.features, columns))
    slots = launch.slots if isinstance(step, Gate) else None
    config = config or select_config(block, m=len(x), gated=slots is not None)
    parts = parts_that_fit(config.parts, len(x), slots)
    groups = 1 if tokens is None else tokens.sums.shape[1]
    group = launch.features // groups if groups > 1 else 1
    share = block if parts == 1 else share_of(columns, parts, group)
    interpreted = not x.is_cuda
    pdl = config.launch_pdl and not interpreted and can_overlap(x.device.index)
    total = x if launch.total is None else launch.total
    residual = x if launch.residual is None else launch.residual
    for _ in range(runs_to_meet(parts, interpreted=interpreted)):
        token_kernel[(len(x), parts)](
            x, x.stride(0),
            residual, residual.stride(0),
            x if norm is None else norm.weight,
            x if norm is None or norm.bias is None else norm.bias,
            out, out.stride(0),
            total, total.stride(0),
            x if tokens is None else tokens.scale,
            x if tokens is None else tokens.zero_point,
            x if tokens is None else tokens.sums,
            x if slots is None else slots_of(slots, parts),
            0.0 if norm is None else norm.eps,
            K=launch.features,
            L=columns,
            GROUPS=groups,
            BITS=0 if tokens is None else tokens.bits,
            PROLOGUE=launch.prologue,
            NORM=norm is not None,
            HAS_RESIDUAL=launch.residual is not None,
            BLOCK=row_block(share),
            PARTS=parts,
            SHARE=share,
            RAPID=config.rapid_division and not interpreted,
            NATIVE_EXP=config.native_exp,
            PDL=pdl,
            INTERP=interpreted,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **({"launch_pdl": True} if pdl else {}),
            **({} if interpreted else register_options(parts, config.num_warps)),
        )  # fmt: skip


def row_block(columns: int) -> int:
    """The power of two that holds the columns of a program."""
    return max(16, 1 << (columns - 1).bit_length())


def new_tokens(
    x: torch.Tensor, features: int, form: TokenForm, out: TokenCodes | None
) -> TokenCodes:
    """Take `out` or allocate what a launch writes.

    Raises:
        ValueError: if the form does not fit the features, or `out` the form.
    """
    columns = features if form.columns is None else form.columns
    m, size = len(x), features // form.groups
    ragged = features % form.groups or (form.groups > 1 and size & (size - 1))
    if ragged or columns < features:
        raise ValueError(f"{form.groups} groups and {columns} columns do not fit K = {features}")
    if out is None:
        return TokenCodes(
            codes=x.new_empty((m, columns), dtype=torch.int8),
            scale=x.new_empty(m, dtype=torch.float32),
            zero_point=x.new_empty(m, dtype=torch.int32),
            sums=x.new_empty((m, form.groups), dtype=torch.int32),
            bits=form.bits,
        )
    if out.codes.shape != (m, columns) or out.sums.shape != (m, form.groups):
        raise ValueError(
            f"out has codes {tuple(out.codes.shape)} and sums {tuple(out.sums.shape)},"
            f" need ({m}, {columns}) and ({m}, {form.groups})"
        )
    return out


def halves(gate_up: torch.Tensor) -> int:
    """Features I of packed rows ``[M, 2 I]``.

    Raises:
        ValueError: if their number is odd.
    """
    half, odd = divmod(gate_up.shape[-1], 2)
    if odd:
        raise ValueError(f"a packed gate-up row of {gate_up.shape[-1]} features has no halves")
    return half

"""Quantizing tokens with what precedes it in a decoder layer, ready to be timed.

    rms_norm_quantize    residual + x, normalized, to codes: before qkv and before gate-up
    silu_quantize        silu(gate) * up, to codes: before down
    quantize             codes of x alone: before o

Tokens have just been written by the kernel before, so they may lie in the cache. A right output has
every bit of the plain torch reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from benchmarks.kernel_rivals import Prepared
from benchmarks.timing import Output
from kernels.layer_math import Gate, Norm, NormKind
from kernels.quantize_tokens import (
    NormedTokens,
    TokenForm,
    quantize_gated,
    quantize_gated_reference,
    quantize_normed,
    quantize_normed_reference,
    quantize_tokens,
    quantize_tokens_reference,
)
from kernels.token_parts import make_slots
from kernels.tokens import TokenCodes

__all__ = ["TOKEN_CASES", "TOY_TOKEN_CASES", "TokenCase", "TokenOp", "prepare_tokens"]

MEMORY_BYTES_PER_US = 3.0e6
COPIES = 2


class TokenOp(StrEnum):
    """What happens to the tokens."""

    NORMED = "rms_norm_quantize"
    """Added to the residual stream and normalized."""
    GATED = "silu_quantize"
    """Gated."""
    PLAIN = "quantize"
    """Nothing before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCase:
    """M tokens of K features to codes of 8 bits."""

    op: TokenOp
    k: int
    m: int
    a_bits: int = 8

    @property
    def label(self) -> str:
        """For a person."""
        return f"{self.op} A{self.a_bits} {self.k} m{self.m}"

    @property
    def moved_bytes(self) -> int:
        """16-bit values read and written, and a byte a code."""
        values = {TokenOp.NORMED: 3, TokenOp.GATED: 2, TokenOp.PLAIN: 1}[self.op]
        return self.m * self.k * (2 * values + 1)

    @property
    def roofline_us(self) -> float:
        """The least time of an H100, were the tokens in memory."""
        return self.moved_bytes / MEMORY_BYTES_PER_US


TOKEN_CASES: Sequence[TokenCase] = tuple(
    TokenCase(op=op, k=k, m=m)
    for m in (1, 16, 2048)
    for op, k in (
        (TokenOp.NORMED, 4096), (TokenOp.GATED, 11008), (TokenOp.PLAIN, 4096),
        (TokenOp.NORMED, 8192), (TokenOp.GATED, 28672),
    )
)  # fmt: skip
TOY_TOKEN_CASES: Sequence[TokenCase] = tuple(TokenCase(op=op, k=96, m=2) for op in TokenOp)


def prepare_tokens(case: TokenCase, device: torch.device) -> Prepared:
    """Draw tokens and launch them: the kernel on a GPU, the reference on a CPU."""
    kernel, reference = _functions(case, device)
    width = 2 * case.k if case.op is TokenOp.GATED else case.k
    inputs = [
        torch.randn(2, case.m, width, device=device).bfloat16().unbind() for _ in range(COPIES)
    ]
    launched = kernel if device.type == "cuda" else reference
    expected = [reference(*each) for each in inputs]

    def check(output: Output) -> bool:
        return any(
            all(torch.equal(mine, its) for mine, its in zip(output, right, strict=True))
            for right in expected
        )

    return Prepared(launch=lambda index: launched(*inputs[index]), copies=COPIES, check=check)


Function = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def _functions(case: TokenCase, device: torch.device) -> tuple[Function, Function]:
    form = TokenForm(bits=case.a_bits)
    match case.op:
        case TokenOp.NORMED:
            weight = torch.randn(case.k, device=device).bfloat16()
            norm = Norm(kind=NormKind.RMS, weight=weight, eps=1e-5)
            return (
                lambda x, residual: _parts(quantize_normed(x, norm, form, residual=residual)),
                lambda x, residual: _parts(
                    quantize_normed_reference(x, norm, form, residual=residual)
                ),
            )
        case TokenOp.GATED:
            slots = make_slots(device)
            return (
                lambda x, _: _parts(quantize_gated(x, Gate.SILU, form, slots=slots)),
                lambda x, _: _parts(quantize_gated_reference(x, Gate.SILU, form)),
            )
        case TokenOp.PLAIN:
            return (
                lambda x, _: _parts(quantize_tokens(x, form)),
                lambda x, _: _parts(quantize_tokens_reference(x, form)),
            )


def _parts(written: TokenCodes | NormedTokens) -> tuple[torch.Tensor, ...]:
    if isinstance(written, NormedTokens):
        return (*_parts(written.tokens), written.residual)
    return written.codes, written.scale, written.zero_point, written.sums

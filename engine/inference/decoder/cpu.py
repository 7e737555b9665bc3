"""The decoder on a CPU: plain torch, the products of `QuantLinear`.

Shape legend: M tokens, K features, H key-value heads, G query heads of each, T keys, D dims.
"""

import torch

from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.operands import (
    Activation,
    InputPasses,
    NormedInputs,
    Operand,
    PlainSource,
    Reading,
    Source,
)
from engine.inference.decoder.projection import DerivedMatrix, FloatMatrix, Matrix
from engine.inference.decoder.stored import FloatLinear, StoredLinear
from engine.modules.operand import derive_operand
from engine.modules.rotated import OnlineHadamard
from kernels.attention import Scoring
from kernels.kv_append import HeadNorms, HeadStates, Rotary, append_kv_reference
from kernels.kv_pages import KvPages
from kernels.layer_math import Norm, NormKind, apply_norm

__all__ = ["CpuDevice", "CpuPasses"]


class CpuPasses:
    """Values alone: the products round them."""

    def normed(
        self, x: torch.Tensor, norm: Norm, reading: Reading, residual: torch.Tensor | None = None
    ) -> NormedInputs:
        """Add to the residual stream and normalize."""
        assert reading.is_values, "products of a CPU read values"
        total = x if residual is None else x + residual
        return NormedInputs(operand=_normalize(total, norm), total=total)

    def plain(self, x: torch.Tensor, reading: Reading) -> Operand:
        """Leave values as they are."""
        assert reading.is_values, "products of a CPU read values"
        return x

    def activated(self, x: torch.Tensor, activation: Activation, reading: Reading) -> Operand:
        """Activate."""
        assert reading.is_values, "products of a CPU read values"
        return activation.apply(x)


class CpuDevice:
    """The CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._passes = CpuPasses()

    @property
    def passes(self) -> InputPasses:
        """How operands are made."""
        return self._passes

    def matrix(
        self, linear: StoredLinear | FloatLinear, out_dtype: torch.dtype | None = None
    ) -> Matrix:
        """Derive int8 columns, or a float weight where inputs are not rounded."""
        if isinstance(linear, FloatLinear):
            return FloatMatrix(weight=linear.weight, bias=linear.bias)
        return DerivedMatrix(
            operand=derive_operand(linear.codes(), linear.params, linear.a_bits),
            bias=linear.bias,
            a_bits=linear.a_bits,
            transform=OnlineHadamard(linear.hadamard) if linear.hadamard else None,
        )

    def new_pages(
        self, pages: int, kv_heads: int, head_dim: int, *, kv_bits: int, page_size: int
    ) -> KvPages:
        """Allocate the cache of one layer: any size of a head, and the dtype of the stream."""
        return KvPages.zeros(
            pages, kv_heads, head_dim, bits=kv_bits, page_size=page_size, dtype=self._dtype
        )

    def append(
        self,
        states: HeadStates,
        pages: KvPages,
        slots: torch.Tensor,
        rotary: Rotary | None,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        """Normalize, rotate and store."""
        query = append_kv_reference(pages, states, slots, rotary, norms=norms)
        assert query is not None, "the states have queries"
        return query

    def attend(
        self,
        query: torch.Tensor,
        pages: KvPages,
        batch: TokenBatch,
        scoring: Scoring,
        biases: torch.Tensor | None,
    ) -> Source:
        """Attend sequence by sequence in float32."""
        out = torch.zeros_like(query)
        first = list(range(batch.decodes))
        chunks = [] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
        starts = [*first, *(batch.decodes + each for each in chunks or [0])]
        for number, length in enumerate(batch.lengths.tolist()):
            rows = slice(starts[number], starts[number + 1])
            if length and rows.stop > rows.start:
                seen = _Seen.of(pages, batch.block_table[number], length, rows, scoring.window)
                out[rows] = seen.attend(query[rows], scoring, biases).to(query.dtype)
        return PlainSource(self._passes, out.view(len(out), -1))


class _Seen:
    """Keys and values that the last queries of one sequence see: float32 ``[H, T, D]``."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, first: int) -> None:
        self._key, self._value, self._first = key, value, first

    @classmethod
    def of(
        cls, pages: KvPages, table: torch.Tensor, length: int, rows: slice, window: int | None
    ) -> "_Seen":
        """Read them back from the pages, from the first that any query sees."""
        count = rows.stop - rows.start
        first = 0 if window is None else max(0, length - count - window + 1)
        at = torch.arange(first, length)
        slots = table[at // pages.page_size] * pages.page_size + at % pages.page_size
        key, value = pages.stored(slots)
        return cls(key, value, first)

    def attend(
        self, query: torch.Tensor, scoring: Scoring, biases: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend float ``[M, H G, D]``, the last M tokens."""
        m, heads, head_dim = query.shape
        kv_heads, keys, _ = self._key.shape
        group = heads // kv_heads
        q = query.float().view(m, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        scores = (q.reshape(kv_heads, group * m, head_dim) @ self._key.transpose(1, 2)).view(
            kv_heads, group, m, keys
        )
        scores *= scoring.softmax_scale
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
        if biases is not None:
            seen = biases[:, self._first : self._first + keys]
            scores += seen.view(kv_heads, group, 1, keys)
        if m > 1:
            scores.masked_fill_(_hidden(m, keys, scoring.window), float("-inf"))
        weights = scores.softmax(-1).view(kv_heads, group * m, keys)
        out = (weights @ self._value).view(kv_heads, group, m, head_dim)
        return out.permute(2, 0, 1, 3).reshape(m, heads, head_dim)


def _hidden(queries: int, keys: int, window: int | None) -> torch.Tensor:
    """Which keys a query does not see: bool ``[queries, keys]``."""
    behind = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
    hidden = behind < 0
    return hidden if window is None else hidden | (behind >= window)


def _normalize(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    if x.dtype != torch.float32:
        return apply_norm(x, norm)
    # the order of a sum does not matter here, and torch has all steps in one
    weight, shape = norm.weight, (x.shape[-1],)
    match norm.kind:
        case NormKind.LAYER:
            return torch.nn.functional.layer_norm(x, shape, weight, norm.bias, norm.eps)
        case NormKind.RMS_PLUS_ONE:
            weight = weight + 1
        case NormKind.RMS:
            pass
    return torch.nn.functional.rms_norm(x, shape, weight, norm.eps)

"""The decoder on a GPU: every step is a kernel of `kernels`, nothing waits for the host.

Launches of a layer at decode, as Llama has them:

    1  quantize_normed      residual sum, norm, codes
    2  integer_linear       query, key and value in one
    3  append_kv            head norms, rotary embedding, codes of keys and values into the pages
    4  attended_tokens      attention, by chunks where a context is split
    5  attended_tokens      chunks combined, codes of the heads' outputs
    6  integer_linear       output
    7  quantize_normed      residual sum, norm, codes
    8  integer_linear       gate and up in one
    9  quantize_gated       gate, codes, few tokens in parts; `quantize_rotated` with a transform
    10 integer_linear       down

Ten. More are: norms behind attention and feed-forward (two), an activation without a gate (one),
halves that run in parallel (one sum), queries of few bits (two), a transform before the output
product (one where contexts are split), decodes beside chunks (two), experts (theirs, all of them)
and parts that stay apart because their bits differ (one product each and one that joins). Inputs
of 16 bits have no codes: 5 combines chunks, or is not needed.

Shape legend: M tokens, K features.
"""

from dataclasses import replace

import torch

from engine.inference.decoder.attended import AttendedSource
from engine.inference.decoder.batch import TokenBatch
from engine.inference.decoder.launches import append_config, row_config
from engine.inference.decoder.operands import (
    VALUES,
    Activation,
    InputPasses,
    NormedInputs,
    Operand,
    Reading,
    Source,
)
from engine.inference.decoder.projection import DerivedMatrix, FloatMatrix, Matrix, SlicedMatrix
from engine.inference.decoder.stored import FloatLinear, StoredLinear
from engine.modules.operand import pack_operand
from engine.modules.rotated import OnlineHadamard
from engine.spec import FULL_BITS
from kernels import kv_append
from kernels import quantize_tokens as tokens
from kernels import rotated_tokens as rotated
from kernels.attention import Scoring
from kernels.kv_append import HeadNorms, HeadStates, Rotary
from kernels.kv_pages import KvPages
from kernels.layer_math import Norm
from kernels.layer_ops import gate_values, normalize_values
from kernels.linear import can_multiply, make_counters
from kernels.sliced import slice_weight
from kernels.token_parts import make_slots

__all__ = ["GpuDevice", "GpuPasses"]


class GpuPasses:
    """Operands by one launch each, where a kernel knows the step."""

    def __init__(self, device: torch.device, *, launch_pdl: bool) -> None:
        self._launch_pdl = launch_pdl
        self._slots = make_slots(device)
        self._transforms: dict[int, OnlineHadamard] = {}

    @property
    def slots(self) -> torch.Tensor:
        """Where programs that share a token meet, in any launch of the stream."""
        return self._slots

    def add_transform(self, block: int, device: torch.device) -> None:
        """Make the factors of a transform before anything is recorded."""
        if block not in self._transforms:
            self._transforms[block] = OnlineHadamard(block).to(device)

    def normed(
        self, x: torch.Tensor, norm: Norm, reading: Reading, residual: torch.Tensor | None = None
    ) -> NormedInputs:
        """Add to the residual stream, normalize and quantize."""
        if reading.is_values or reading.hadamard:
            made = normalize_values(
                x, norm, residual=residual, config=self._row_config(x.shape[1], len(x))
            )
            operand: Operand = made.values
            if reading != VALUES:
                operand = self.plain(made.values, reading)
            return NormedInputs(operand=operand, total=made.residual)
        config = self._row_config(max(x.shape[1], reading.columns or 0), len(x))
        coded = tokens.quantize_normed(x, norm, reading.form, residual=residual, config=config)
        return NormedInputs(operand=coded.tokens, total=coded.residual)

    def plain(self, x: torch.Tensor, reading: Reading) -> Operand:
        """Quantize, behind a transform where there is one."""
        if reading.hadamard:
            return self._transformed(x, reading, None)
        if reading.is_values:
            return x
        config = self._row_config(max(x.shape[1], reading.columns or 0), len(x))
        return tokens.quantize_tokens(x, reading.form, config=config)

    def activated(self, x: torch.Tensor, activation: Activation, reading: Reading) -> Operand:
        """Activate and quantize."""
        gate = activation.gate
        if gate is None:
            return self.plain(activation.apply(x), reading)
        if reading.hadamard:
            return self._transformed(x, reading, activation)
        columns = max(x.shape[1] // 2, reading.columns or 0)
        config = self._row_config(columns, len(x), gated=True)
        if reading.is_values:
            return gate_values(x, gate, config=config, slots=self._slots)
        return tokens.quantize_gated(x, gate, reading.form, config=config, slots=self._slots)

    def _transformed(
        self, x: torch.Tensor, reading: Reading, activation: Activation | None
    ) -> Operand:
        module = self._transforms[reading.hadamard]
        gate = None if activation is None else activation.gate
        features = x.shape[1] // (1 if gate is None else 2)
        parts = rotated.Transform(left=module.left, right=module.right)
        if not reading.is_values and rotated.can_rotate(features, parts):
            chosen = rotated.select_config(features, parts, m=len(x), shared=True)
            config = replace(chosen, launch_pdl=chosen.launch_pdl and self._launch_pdl)
            return rotated.quantize_rotated(
                x, parts, reading.form, step=gate, config=config, slots=self._slots
            )
        if gate is not None:
            config_of_gate = self._row_config(features, len(x), gated=True)
            x = gate_values(x, gate, config=config_of_gate, slots=self._slots)
        mixed: torch.Tensor = module(x)
        return self.plain(mixed, replace(reading, hadamard=0))

    def _row_config(self, columns: int, m: int, *, gated: bool = False) -> tokens.LaunchConfig:
        return row_config(columns, m, gated=gated, overlaps=self._launch_pdl)


class GpuDevice:
    """One GPU."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, launch_pdl: bool = False
    ) -> None:
        self._device, self._dtype, self._launch_pdl = device, dtype, launch_pdl
        self._counters = make_counters(device)
        self._passes = GpuPasses(device, launch_pdl=launch_pdl)

    @property
    def passes(self) -> InputPasses:
        """How operands are made."""
        return self._passes

    def matrix(
        self, linear: StoredLinear | FloatLinear, out_dtype: torch.dtype | None = None
    ) -> Matrix:
        """Cut into slices; planes where no fast kernel takes the groups."""
        if isinstance(linear, FloatLinear):
            return FloatMatrix(weight=linear.weight, bias=linear.bias)
        full = linear.a_bits == FULL_BITS
        if not full and not can_multiply(linear.in_features, linear.groups):
            return self._packed(linear)
        weight = slice_weight(
            linear.packed,
            linear.scale,
            linear.zero_point,
            linear.in_features,
            half_step=linear.half_step,
        )
        if linear.hadamard:
            self._passes.add_transform(linear.hadamard, self._device)
        reading = Reading(
            bits=linear.a_bits,
            groups=1 if full else weight.groups,
            columns=None if full else weight.columns,
            hadamard=linear.hadamard,
        )
        return SlicedMatrix(
            weight=weight,
            bias=linear.bias,
            reading=reading,
            out_dtype=self._dtype if out_dtype is None else out_dtype,
            counters=self._counters,
        )

    def new_pages(
        self, pages: int, kv_heads: int, head_dim: int, *, kv_bits: int, page_size: int
    ) -> KvPages:
        """Allocate the cache of one layer."""
        return KvPages.allocate(
            pages,
            kv_heads,
            head_dim,
            bits=kv_bits,
            page_size=page_size,
            dtype=self._dtype,
            device=self._device,
        )

    def append(
        self,
        states: HeadStates,
        pages: KvPages,
        slots: torch.Tensor,
        rotary: Rotary | None,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        """Normalize, rotate and store in one launch."""
        config = append_config(len(slots), pages.kv_heads, overlaps=self._launch_pdl)
        query = kv_append.append_kv(pages, states, slots, rotary, norms=norms, config=config)
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
        """Attend: decoding sequences by one kernel, chunks of prompts by another."""
        assert biases is None, "tables of positions refuse biases on a GPU"
        return AttendedSource(
            passes=self._passes,
            query=query,
            pages=pages,
            batch=batch,
            scoring=scoring,
            launch_pdl=self._launch_pdl,
            slots=self._passes.slots,
        )

    def _packed(self, linear: StoredLinear) -> Matrix:
        transform = OnlineHadamard(linear.hadamard) if linear.hadamard else None
        return DerivedMatrix(
            operand=pack_operand(linear.codes(), linear.params),
            bias=linear.bias,
            a_bits=linear.a_bits,
            transform=None if transform is None else transform.to(self._device),
        )

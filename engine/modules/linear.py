"""The quantized linear layer as a checkpoint stores it and as a model runs it."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn
from typing_extensions import override

from engine.modules.operand import (
    Operand,
    derive_operand,
    multiply,
    operand_bytes,
    pack_operand,
)
from engine.modules.rotated import OnlineHadamard
from engine.numerics.affine import AffineParams, dequantize_weight, quantize_weight
from engine.spec import FULL_BITS, WeightGrid
from kernels.int_linear import PackedWeight
from kernels.layouts import pack_codes, packed_words, unpack_codes
from kernels.linear import can_multiply
from kernels.sliced import SlicedWeight, slice_weight

__all__ = ["QuantLinear"]


class QuantLinear(nn.Module):
    """A linear layer on packed weights.

    Buffers have the names and shapes of the checkpoint: ``weight_packed`` int32
    ``[P, N, ceil(K / 32)]``, ``weight_scale`` float16 ``[N, S]``, ``weight_zero_point`` uint8
    ``[N, S]`` and ``bias`` ``[N]`` or None. What the machine multiplies with is derived from them
    by `prepare`: int8 columns on a CPU (one byte a weight; `kernels.cpu_linear` says why), a
    dequantized float32 weight on a CPU where activations stay in full precision, and, where
    they are rounded, slices of fields on a GPU (`kernels.sliced`). A layer that is not prepared
    multiplies the planes.

    With `input_hadamard`, the block of a Hadamard transform, inputs are transformed before they are
    rounded and multiplied; the codes are those of the transformed weight
    (`engine.numerics.hadamard.rotate_columns`).
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: WeightGrid,
        a_bits: int,
        bias_dtype: torch.dtype | None = None,
        input_hadamard: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.grid = grid
        self.a_bits = a_bits
        group = grid.group_of(self.in_features)
        assert self.in_features % group == 0, f"group {group} must divide {self.in_features}"
        n, groups = self.out_features, self.in_features // group
        words = packed_words(self.in_features)
        self.register_buffer("weight_packed", torch.zeros(grid.planes, n, words, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.zeros(n, groups, dtype=torch.float16))
        self.register_buffer("weight_zero_point", torch.zeros(n, groups, dtype=torch.uint8))
        self.register_buffer(
            "bias", None if bias_dtype is None else torch.zeros(n, dtype=bias_dtype)
        )
        self.transform = OnlineHadamard(input_hadamard) if input_hadamard else None
        self._operand: Operand | None = None
        self.remainder: torch.Tensor | None = None
        """float16 ``[N, K]``: what rounding took off each weight, in steps, where codes shall still
        be trained; a checkpoint does not have it."""

    @classmethod
    def from_weight(
        cls,
        w_NK: torch.Tensor,  # noqa: N803  shape suffix
        params: AffineParams,
        grid: WeightGrid,
        a_bits: int,
        bias: torch.Tensor | None = None,
        input_hadamard: int = 0,
    ) -> Self:
        """Round a float ``[N, K]`` weight, transformed already, onto a placed grid and pack it."""
        codes_NK = quantize_weight(w_NK, params, grid)  # noqa: N806  shape suffix
        return cls.from_codes(codes_NK, params, grid, a_bits, bias, input_hadamard)

    @classmethod
    def from_codes(
        cls,
        codes_NK: torch.Tensor,  # noqa: N803  shape suffix
        params: AffineParams,
        grid: WeightGrid,
        a_bits: int,
        bias: torch.Tensor | None = None,
        input_hadamard: int = 0,
    ) -> Self:
        """Pack uint8 ``[N, K]`` codes, on their device."""
        n, k = codes_NK.shape
        with torch.device("meta"):
            module = cls(k, n, grid, a_bits, input_hadamard=input_hadamard)
        if module.transform is not None:
            module.transform.to(codes_NK.device)
        module.weight_packed = pack_codes(codes_NK, grid.planes)
        module.weight_scale = params.scale.detach().clone()
        module.weight_zero_point = params.zero_point.detach().clone()
        module.bias = None if bias is None else bias.detach().clone()
        return module

    @classmethod
    def empty(
        cls, linear: nn.Linear, grid: WeightGrid, a_bits: int, input_hadamard: int = 0
    ) -> Self:
        """Make a layer of a linear's sizes, device and bias, with buffers still to be filled."""
        bias: torch.Tensor | None = linear.bias
        bias_dtype = None if bias is None else bias.dtype
        k, n = linear.in_features, linear.out_features
        with linear.weight.device:
            module = cls(k, n, grid, a_bits, bias_dtype, input_hadamard)
        if module.transform is not None and not linear.weight.is_meta:
            module.transform.to(linear.weight.device)
        return module

    @property
    def input_hadamard(self) -> int:
        """Block of the transform of the inputs; 0 where there is none."""
        return 0 if self.transform is None else self.transform.block

    @property
    def params(self) -> AffineParams:
        """Where the codes lie."""
        return AffineParams(
            scale=self.weight_scale,
            zero_point=self.weight_zero_point,
            half_step=self.grid.half_step,
        )

    @property
    def operand_bytes(self) -> int:
        """Bytes that `prepare` added to the buffers."""
        return 0 if self._operand is None else operand_bytes(self._operand)

    def codes(self) -> torch.Tensor:
        """Unpack the codes: uint8 ``[N, K]``."""
        return unpack_codes(self.weight_packed, self.in_features)

    def dequantized(self) -> torch.Tensor:
        """The float32 ``[N, K]`` weight that the codes stand for, of transformed inputs."""
        return dequantize_weight(self.codes(), self.params)

    def prepare(self, *, dense: bool = False) -> Self:
        """Derive what this device multiplies with; call after loading or moving.

        Args:
            dense: keep a float weight on a GPU too, where inputs stay in full precision: faster
                for many tokens, as calibration has them, and no longer small.
        """
        # a dense weight kept on the GPU would undo the packing
        on_gpu = self.weight_packed.device.type != "cpu"
        rounds_inputs = self.a_bits != FULL_BITS
        if on_gpu and not rounds_inputs and not dense:
            self._operand = None
        elif on_gpu and rounds_inputs and can_multiply(*self._row):
            self._operand = self.sliced()
        else:
            self._operand = self._derive()
        return self

    def sliced(self) -> SlicedWeight:
        """Derive the layout that the fast kernels of a GPU read, on the device of the buffers."""
        return slice_weight(
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.in_features,
            half_step=self.grid.half_step,
        )

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to float ``[..., K]``; the result has the dtype of ``x``."""
        operand = self._operand if self._operand is not None else self._derive()
        if self.transform is None:
            return multiply(x, operand, self.a_bits, self.bias)
        # codes are taken before half precision would round what was mixed
        seen = self.transform(x if self.a_bits == FULL_BITS else x.float())
        return multiply(seen, operand, self.a_bits, self.bias).to(x.dtype)

    @override
    def _apply(
        self,
        fn: Callable[[torch.Tensor], torch.Tensor],
        recurse: bool = True,
    ) -> Self:
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        # a change of dtype is meant for activations and bias; the stored scale is float16
        device = self.weight_packed.device
        moved = torch.empty_like(scale, device=device) if scale.is_meta else scale.to(device)
        self.weight_scale = moved
        self._operand = None
        return self

    @override
    def extra_repr(self) -> str:
        """Say the bits in the model's printout."""
        return (
            f"in={self.in_features}, out={self.out_features}, w_bits={self.grid.bits}, "
            f"a_bits={self.a_bits}, group_size={self.grid.group_size}, "
            f"input_hadamard={self.input_hadamard}"
        )

    @property
    def _row(self) -> tuple[int, int]:
        """Columns and groups."""
        return self.in_features, self.weight_scale.shape[1]

    def _derive(self) -> Operand:
        on_cpu = self.weight_packed.device.type == "cpu"
        if on_cpu or self.a_bits == FULL_BITS:
            return derive_operand(self.codes(), self.params, self.a_bits)
        if self.grid.half_step:
            return pack_operand(self.codes(), self.params)
        return PackedWeight.from_stored(
            self.weight_packed, self.weight_scale, self.weight_zero_point, self.in_features
        )

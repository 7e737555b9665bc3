"""What linears read: the same inputs in the one or other form, made when first asked for.

A norm, a gate or attention gives its values to several linears, which may want codes of other bits
or groups. A source makes each form once, fused with what precedes it where the device can.

Shape legend: M tokens, K features.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.spec import FULL_BITS
from kernels.layer_math import Gate, Norm
from kernels.quantize_tokens import TokenForm
from kernels.tokens import TokenCodes

__all__ = [
    "VALUES",
    "ActivatedSource",
    "Activation",
    "InputPasses",
    "NormedInputs",
    "NormedSource",
    "Operand",
    "PlainSource",
    "Reading",
    "Source",
]

Operand = torch.Tensor | TokenCodes
"""float ``[M, K]``, or codes of them."""
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The form in which a linear reads its inputs."""

    bits: int
    """2..8, or 16 for values as they are."""
    groups: int = 1
    columns: int | None = None
    """Of padded codes."""
    hadamard: int = 0
    """Block of a transform before rounding; 0 for none."""

    @property
    def is_values(self) -> bool:
        """Whether nothing is rounded."""
        return self.bits == FULL_BITS

    @property
    def form(self) -> TokenForm:
        """What a kernel writes."""
        return TokenForm(bits=self.bits, groups=self.groups, columns=self.columns)


VALUES = Reading(bits=FULL_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What lies between up and down."""

    name: str
    """As configs call it."""
    is_gated: bool
    """Whether the first half of the features gates the second."""

    @property
    def gate(self) -> Gate | None:
        """The gate that kernels know; None for any other."""
        if not self.is_gated:
            return None
        return {"silu": Gate.SILU, **dict.fromkeys(TANH_GELUS, Gate.GELU_TANH)}.get(self.name)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Activate float ``[M, K]``, or gate ``[M, 2 K]``, in plain torch; the dtype stays."""
        inner = x.chunk(2, dim=-1) if self.is_gated else (x,)
        active = self._activate(inner[0])
        return active * inner[1] if self.is_gated else active

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        match self.name:
            case "silu":
                return torch.nn.functional.silu(x)
            case "relu":
                return torch.relu(x)
            case _:
                form = "tanh" if self.name in TANH_GELUS else "none"
                return torch.nn.functional.gelu(x, approximate=form)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormedInputs:
    """What a norm gives."""

    operand: Operand
    total: torch.Tensor
    """``[M, K]``: the sum that was normalized; x itself where there was nothing to add."""


class InputPasses(Protocol):
    """How a device makes operands."""

    def normed(
        self,
        x: torch.Tensor,
        norm: Norm,
        reading: Reading,
        residual: torch.Tensor | None = None,
    ) -> NormedInputs:
        """Add float ``[M, K]`` to the residual stream, normalize and bring into a form."""

    def plain(self, x: torch.Tensor, reading: Reading) -> Operand:
        """Bring float ``[M, K]`` into a form."""

    def activated(self, x: torch.Tensor, activation: Activation, reading: Reading) -> Operand:
        """Activate float ``[M, K]``, or gate ``[M, 2 K]``, and bring into a form."""


class Source(Protocol):
    """Inputs of linears."""

    def read(self, reading: Reading) -> Operand:
        """The inputs in a form."""


class PlainSource:
    """Inputs as they are."""

    def __init__(self, passes: InputPasses, x: torch.Tensor) -> None:
        self._passes, self._x = passes, x
        self._made: dict[Reading, Operand] = {VALUES: x}

    def read(self, reading: Reading) -> Operand:
        """The inputs in a form."""
        if reading not in self._made:
            self._made[reading] = self._passes.plain(self._x, reading)
        return self._made[reading]


class NormedSource:
    """The residual stream behind a norm."""

    def __init__(
        self,
        passes: InputPasses,
        x: torch.Tensor,
        norm: Norm,
        residual: torch.Tensor | None = None,
    ) -> None:
        self._passes, self._norm = passes, norm
        self._x, self._residual = x, residual
        self._made: dict[Reading, Operand] = {}

    @property
    def total(self) -> torch.Tensor:
        """The stream itself, ``[M, K]``; summed by the first reading."""
        return self._x if self._residual is None else self._x + self._residual

    def read(self, reading: Reading) -> Operand:
        """The inputs in a form."""
        if reading not in self._made:
            made = self._passes.normed(self._x, self._norm, reading, self._residual)
            # what was summed once is not summed again
            self._x, self._residual = made.total, None
            self._made[reading] = made.operand
        return self._made[reading]


class ActivatedSource:
    """What activation or gate gives."""

    def __init__(self, passes: InputPasses, x: torch.Tensor, activation: Activation) -> None:
        self._passes, self._x, self._activation = passes, x, activation
        self._made: dict[Reading, Operand] = {}

    def read(self, reading: Reading) -> Operand:
        """The inputs in a form."""
        if reading not in self._made:
            self._made[reading] = self._passes.activated(self._x, self._activation, reading)
        return self._made[reading]

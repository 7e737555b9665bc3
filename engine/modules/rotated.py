"""What a rotated model runs beside its linears: the online transform and both ends of the stream.

Parameters keep the names of the modules they replace, and what is computed from a seed or a block
size is not in the state dict, so a checkpoint's tensors have the same names with and without.
"""

from typing import Self

import torch
from torch import nn
from typing_extensions import override

from engine.errors import UnsupportedModel
from engine.numerics.hadamard import Factors, factors_of, hadamard, random_signs
from engine.orders import block_of

__all__ = ["OnlineHadamard", "ResidualRotation", "RotatedEmbedding", "UnrotatedNorm"]


class OnlineHadamard(nn.Module):
    """``x H`` in blocks of channels; its factors are real and follow the model's device."""

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, block: int) -> None:
        super().__init__()
        parts = factors_of(block)
        self.block = block
        self.register_buffer("left", parts.left, persistent=False)
        self.register_buffer("right", parts.right, persistent=False)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform float ``[..., K]``; the dtype stays."""
        return hadamard(x, self._factors)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Undo the transform of float ``[..., K]``; the dtype stays."""
        return hadamard(x, self._factors, inverse=True)

    @property
    def _factors(self) -> Factors:
        return Factors(left=self.left, right=self.right)


class ResidualRotation(nn.Module):
    """``x diag(signs) H``, the rotation of a stream of `width` channels."""

    signs: torch.Tensor

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("signs", random_signs(width, seed), persistent=False)
        self.transform = OnlineHadamard(block_of(width))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate float ``[..., H]``; the dtype stays."""
        rotated: torch.Tensor = self.transform(x * self.signs.to(x.dtype))
        return rotated

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate float ``[..., H]`` back; the dtype stays."""
        return self.transform.inverse(x) * self.signs.to(x.dtype)


class RotatedEmbedding(nn.Embedding):
    """An embedding that gives rotated rows; its weight is the source's, so a tied head reads it."""

    def __init__(self, embedding: nn.Embedding, seed: int) -> None:
        vocabulary, width = embedding.weight.shape
        super().__init__(vocabulary, width, _weight=embedding.weight, _freeze=True)
        self.rotation = ResidualRotation(width, seed)

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up ids ``[...]`` and rotate: ``[..., H]``."""
        rows: torch.Tensor = self.rotation(super().forward(input))
        return rows

    def rotated_weight(self) -> torch.Tensor:
        """All rows as the first layer sees them: ``[vocab, H]``."""
        rows: torch.Tensor = self.rotation(self.weight)
        return rows


class UnrotatedNorm(nn.Module):
    """An RMS norm of the rotated stream: ``x R^T / rms(x) * weight``, computed in float32."""

    def __init__(self, weight: nn.Parameter, eps: float, seed: int) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.rotation = ResidualRotation(len(weight), seed)

    @classmethod
    def of(cls, norm: nn.Module, seed: int) -> Self:
        """Take the place of a family's RMS norm.

        Raises:
            UnsupportedModel: if the module does not say its epsilon.
        """
        eps = getattr(norm, "variance_epsilon", None)
        if not isinstance(eps, float):
            raise UnsupportedModel(
                "model_type", f"{type(norm).__name__} is no RMS norm that can be rotated"
            )
        return cls(norm.get_parameter("weight"), eps, seed)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate back and normalize ``[..., H]``; the dtype stays."""
        plain = self.rotation.inverse(x.float())
        power = plain.square().mean(-1, keepdim=True)
        normed = (plain * torch.rsqrt(power + self.eps)).to(x.dtype)
        return self.weight * normed

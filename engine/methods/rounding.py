"""Which code each weight gets."""

import torch

from engine.numerics.affine import AffineParams, quantize_weight
from engine.spec import WeightGrid

__all__ = ["Nearest"]


class Nearest:
    """The nearest code, half to even, each weight for itself."""

    def codes(self, weight: torch.Tensor, params: AffineParams, grid: WeightGrid) -> torch.Tensor:
        """Round float ``[N, K]`` to uint8 codes ``[N, K]``."""
        return quantize_weight(weight, params, grid)

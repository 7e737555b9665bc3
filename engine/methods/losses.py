"""What a wrong block output is worth."""

import torch

__all__ = ["OutputError"]


class OutputError:
    """Mean squared error of the block output, after the residual: ``mean((seen - wanted)^2)``."""

    def __call__(self, seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Compare ``[B, T, H]`` outputs; the result is a scalar."""
        return torch.nn.functional.mse_loss(seen, wanted)

"""The weight-only linear layer: full-precision activations on packed weights.

    W[n,k] = (u_w[n,k] - z_w[n,g]) * s_w[n,g]        Y = X W^T + bias

The weight is exact in float32 (8 bits of code times 11 bits of scale); it is rounded once, to the
dtype of the activations.

Shape legend: M tokens, N outputs, K inputs, G inputs in a group, S = K / G groups.
"""

import torch

__all__ = ["float_linear"]


def float_linear(
    x: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply activations by a dequantized weight.

    Args:
        x: float ``[..., K]``.
        w_NK: float ``[N, K]``, cast to the dtype of ``x``.
        bias: float ``[N]`` or None.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, w_NK.to(x.dtype), bias)

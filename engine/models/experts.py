"""The experts of a layer as linears of their own, in place of transformers' fused tensors.

    y = sum over the chosen experts e of  p_e down_e( act(gate_e(x)) * up_e(x) )

The router stays as it is: it chooses the experts and their weights p for every token.

Shape legend: T tokens, H hidden size, C experts chosen for a token.
"""

import torch
from torch import nn
from typing_extensions import override

from engine.families.sizes import Sizes

__all__ = ["SeparateExperts"]


class SeparateExperts(nn.ModuleList):
    """Experts by number; each computes on the tokens that chose it, one without tokens not at all.

    Takes the place of `MixtralExperts` and of what is called like it.
    """

    def __init__(self, sizes: Sizes, activation: nn.Module) -> None:
        super().__init__(_Expert(sizes, activation) for _ in range(sizes.experts))

    @override
    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the chosen experts.

        Args:
            hidden: float ``[T, H]``.
            chosen: int64 ``[T, C]``, numbers of experts, distinct for each token.
            weights: float ``[T, C]``.

        Returns:
            ``[T, H]`` in the dtype of `hidden`.
        """
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            if len(token) == 0:
                continue
            part = expert(hidden[token]) * weights[token, place, None]
            # a token is in there once, so the order of additions is always the same
            out = out.index_add(0, token, part.to(out.dtype))
        return out


class _Expert(nn.Module):
    def __init__(self, sizes: Sizes, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)
        self.activation = activation

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out

"""What stands before and behind the decoder layers, by the family's table."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from typing_extensions import override

from engine.families.base import Family

__all__ = ["SoftCap", "entry_names", "exit_names", "has_module", "join_exit"]


class SoftCap(nn.Module):
    """``cap * tanh(x / cap)``, which Gemma applies to logits."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Limit a tensor of any shape to -cap .. cap."""
        return self.cap * torch.tanh(x / self.cap)


def has_module(skeleton: nn.Module, name: str) -> bool:
    """Whether there is a module of that full name; None in its place is none."""
    parent, _, last = name.rpartition(".")
    return isinstance(getattr(skeleton.get_submodule(parent), last, None), nn.Module)


def entry_names(skeleton: nn.Module, family: Family) -> tuple[str, ...]:
    """Modules with weights between tokens and the first layer, beside the embedding."""
    return _present(skeleton, family.beside_embedding)


def exit_names(skeleton: nn.Module, family: Family) -> tuple[str, ...]:
    """Modules from the last layer to the logits, in their order."""
    return _present(skeleton, (family.final_norm, *family.before_head, family.head))


def join_exit(
    skeleton: nn.Module, family: Family, load: Callable[[str], nn.Module]
) -> nn.Sequential:
    """Join what stands behind the layers: hidden states in, logits out.

    Args:
        skeleton: the whole model; its config says whether logits are capped.
        family: of the model.
        load: gives the module of a full name, with weights.
    """
    modules = [load(name) for name in exit_names(skeleton, family)]
    cap = getattr(skeleton.config, "final_logit_softcapping", None)
    if cap is not None:
        modules.append(SoftCap(float(cap)))
    return nn.Sequential(*modules)


def _present(skeleton: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if has_module(skeleton, name))

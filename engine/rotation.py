"""Which Hadamard rotations a model carries; torch-free.

    R1  residual stream   x R, R = diag(signs) H: the embedding's output is rotated, every layer
                          reads and writes rotated, the final norm's input is rotated back
    R2  each head         values v_proj writes and o_proj reads, inside the weights alone
    R4  online            the inputs of down_proj, at run time: x H, weights W H

R1 and R2 come together and cost nothing inside the layers. QuaRot, arXiv:2404.00456.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from engine.architecture import Architecture
from engine.errors import SpecError
from engine.families.base import NormKind
from engine.fields import check_range
from engine.orders import block_of
from engine.spec import QuantSpec

__all__ = [
    "Rotation",
    "check_rotation",
    "name_in_layer",
    "online_blocks",
]

MAX_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The rotations of one model."""

    seed: int | None
    """Chooses the signs of the residual rotation; None leaves stream and heads as they are."""
    online_hadamard: bool
    """Whether inputs of the MLP's last linears are transformed at run time."""

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_range("rotation.seed", self.seed, 0, MAX_SEED)

    @classmethod
    def none(cls) -> Self:
        """No rotation at all."""
        return cls(seed=None, online_hadamard=False)

    @classmethod
    def of(cls, spec: QuantSpec, architecture: Architecture) -> Self:
        """Read what a spec asks for; what only its recipe asks for is off where it cannot be."""
        asked, chosen = spec.ingredients, spec.resolved
        family = architecture.family
        rotates = chosen.rotation and (bool(asked.rotation) or family.rotates)
        return cls(
            seed=spec.calibration.seed if rotates else None,
            online_hadamard=chosen.online_hadamard,
        )

    @property
    def is_none(self) -> bool:
        """Whether the model is as its source."""
        return self.seed is None and not self.online_hadamard


def check_rotation(architecture: Architecture, rotation: Rotation) -> None:
    """Refuse a rotation that this family cannot take.

    Raises:
        SpecError: naming the ingredient, the family and what would do.
    """
    family = architecture.family
    value = rotation.seed is not None
    if value and not (family.rotates and family.norm is NormKind.RMS):
        raise SpecError(
            "ingredients.rotation",
            value,
            f"the residual stream of {architecture.model_type} cannot be rotated: something else"
            " than an RMS norm before linears reads it; leave it out or use online_hadamard",
        )


def online_blocks(architecture: Architecture, rotation: Rotation) -> dict[str, int]:
    """Find the linears whose inputs are transformed at run time.

    Returns:
        Channels in a block, by the linear's name inside a layer; empty where that is off.
    """
    if not rotation.online_hadamard:
        return {}
    family = architecture.family
    patterns = family.online_hadamard or tuple(
        name
        for pair in architecture.pairs
        if pair.name.split(".")[0] == "fc2"
        for name in pair.consumers
    )
    widths = {
        name_in_layer(architecture, each.name): each.in_features
        for each in architecture.linears_per_layer
    }
    return {
        name: block_of(width)
        for name, width in widths.items()
        if any(fnmatchcase(name, each) for each in patterns) and block_of(width) > 1
    }


def name_in_layer(architecture: Architecture, name: str) -> str:
    """Cut the layer off a full name: `model.layers.3.mlp.up_proj` is `mlp.up_proj`."""
    return name.removeprefix(f"{architecture.family.layers}.").partition(".")[2]

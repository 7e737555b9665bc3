"""What a calibration is composed of: named recipes, and a switch for every single ingredient.

A recipe answers every question; an `Ingredients` field that is not None answers that one question
otherwise. What was resolved is recorded in the manifest. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, ClassVar, Self

from engine.fields import check_flag, check_number, check_range, known_fields, read_choice

__all__ = [
    "Clipping",
    "EndToEnd",
    "Ingredients",
    "Recipe",
    "Resolved",
    "Rounding",
    "SecondOrder",
    "resolve",
]


FULL_BITS = 16


class Recipe(StrEnum):
    """Named compositions of transform, clipping, rounding and loss (docs/calibration.md)."""

    RTN = "rtn"
    """Round to nearest on the min-max grid; nothing is trained."""
    LWC = "lwc"
    """Learnable weight clipping, trained on the output error of each decoder layer."""
    OMNIQUANT = "omniquant"
    """OmniQuant's setting: learnable clipping; below 16-bit inputs also its transformation."""
    FAST = "fast"
    """Minutes: rotation where it helps, clips by search, second-order rounding; no training."""
    DEFAULT = "default"
    """The fast start, then rounding and clips learned layer by layer, then scales end to end."""
    ACCURATE = "accurate"
    """As default, with weights trained beside their scales, three times as long."""


class Clipping(StrEnum):
    """Which part of a group's range the grid covers."""

    FULL = "full"
    """All of it."""
    SEARCHED = "searched"
    """The common factor with the least rounding error, weighted by the inputs."""
    LEARNED = "learned"
    """Starts there; then both ends are trained as parts of the weight's range (LWC)."""
    FACTORS = "factors"
    """Placed there for good; then each end has a factor that is trained beside the rounding."""


class SecondOrder(StrEnum):
    """How the error of a rounded column is passed on to the columns after it."""

    NONE = "none"
    """It is not."""
    GPTQ = "gptq"
    """By the inputs' second moments (GPTQ)."""
    GPTAQ = "gptaq"
    """As GPTQ, and towards the full-precision chain's outputs (GPTAQ)."""


class Rounding(StrEnum):
    """What is learned about the code of each weight."""

    NEAREST = "nearest"
    """Nothing."""
    LEARNED = "learned"
    """An offset of at most half a step (AutoRound)."""
    TRAINED = "trained"
    """The weight itself, without bound (EfficientQAT's Block-AP)."""


class EndToEnd(StrEnum):
    """What is tuned at the end, over the whole model, against the full-precision logits."""

    NONE = "none"
    """Nothing."""
    SCALES = "scales"
    """Scales and norm weights; codes stay."""
    WEIGHTS = "weights"
    """Weights, scales and norm weights; codes are chosen anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredients:
    """Answers to single questions; None leaves the answer to the recipe."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rotation: bool | None = None
    """Hadamard rotation of the residual stream, and of values between v_proj and o_proj."""
    online_hadamard: bool | None = None
    """Hadamard transform of down_proj's inputs, computed at run time."""
    equivalent_transform: bool | None = None
    """Learnable scales (and shifts, where a producer has a bias) between layers (LET)."""
    clipping: Clipping | None = None
    second_order: SecondOrder | None = None
    rounding: Rounding | None = None
    compensation: bool | None = None
    """A learned rank-1 change of down_proj in the first and last layers (ABQ-LLM eq. 3)."""
    own_input_loss: float | None = None
    """Weight of the error against the full-precision layer on the quantized chain's inputs."""
    cosine_loss: float | None = None
    """Weight of the distribution correction loss (ABQ-LLM eq. 2)."""
    attention_loss: float | None = None
    """Weight of the attention-map divergence (ABQ-LLM eq. 4)."""
    end_to_end: EndToEnd | None = None
    end_to_end_epochs: int | None = None
    """Passes over the samples at the end."""
    epochs_factor: int | None = None
    """Times that a layer's passes over the samples are multiplied."""

    def __post_init__(self) -> None:
        for name in ("rotation", "online_hadamard", "equivalent_transform", "compensation"):
            if getattr(self, name) is not None:
                check_flag(f"ingredients.{name}", getattr(self, name))
        for name in ("own_input_loss", "cosine_loss", "attention_loss"):
            if getattr(self, name) is not None:
                check_number(f"ingredients.{name}", getattr(self, name), 0, 100)
        if self.end_to_end_epochs is not None:
            check_range("ingredients.end_to_end_epochs", self.end_to_end_epochs, 0, 100)
        if self.epochs_factor is not None:
            check_range("ingredients.epochs_factor", self.epochs_factor, 1, 20)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            SpecError: naming the field, the value and what would do.
        """
        values = known_fields(cls, record, "ingredients.")
        kinds = {
            "clipping": Clipping,
            "second_order": SecondOrder,
            "rounding": Rounding,
            "end_to_end": EndToEnd,
        }
        for name, kind in kinds.items():
            if values.get(name) is not None:
                values[name] = read_choice(f"ingredients.{name}", values[name], kind)
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Every question answered; the fields are those of `Ingredients`."""

    rotation: bool = False
    online_hadamard: bool = False
    equivalent_transform: bool = False
    clipping: Clipping = Clipping.FULL
    second_order: SecondOrder = SecondOrder.NONE
    rounding: Rounding = Rounding.NEAREST
    compensation: bool = False
    own_input_loss: float = 0.0
    cosine_loss: float = 0.0
    attention_loss: float = 0.0
    end_to_end: EndToEnd = EndToEnd.NONE
    end_to_end_epochs: int = 0
    epochs_factor: int = 1

    @property
    def compares_own(self) -> bool:
        """Whether a loss needs the full-precision layer on the quantized chain's inputs."""
        return self.own_input_loss > 0 or self.cosine_loss > 0


def resolve(
    recipe: Recipe, ingredients: Ingredients, *, a_bits: int, per_channel: bool
) -> Resolved:
    """Answer every question: by the ingredients where they do, else by the recipe."""
    answered = {
        each.name: getattr(ingredients, each.name)
        for each in fields(ingredients)
        if getattr(ingredients, each.name) is not None
    }
    return replace(_answers(recipe, a_bits, per_channel=per_channel), **answered)


def _answers(recipe: Recipe, a_bits: int, *, per_channel: bool) -> Resolved:
    rounds_inputs = a_bits < FULL_BITS
    fast = Resolved(
        # measured (docs/calibration.md): groups of weights alone gain nothing from the first, and
        # the second pays for its transform at run time wherever inputs are rounded
        rotation=per_channel or rounds_inputs,
        online_hadamard=rounds_inputs,
        clipping=Clipping.SEARCHED,
        second_order=SecondOrder.GPTAQ,
    )
    default = replace(
        fast,
        clipping=Clipping.FACTORS,
        rounding=Rounding.LEARNED,
        end_to_end=EndToEnd.SCALES,
        end_to_end_epochs=4,
    )
    answers = {
        Recipe.RTN: Resolved(),
        Recipe.LWC: Resolved(clipping=Clipping.LEARNED),
        Recipe.OMNIQUANT: Resolved(
            clipping=Clipping.LEARNED, equivalent_transform=a_bits < FULL_BITS
        ),
        Recipe.FAST: fast,
        Recipe.DEFAULT: default,
        Recipe.ACCURATE: replace(
            default,
            rounding=Rounding.TRAINED,
            end_to_end_epochs=8,
            # more steps on as much text went on gaining at two bits (docs/calibration.md)
            epochs_factor=3,
        ),
    }
    return answers[recipe]

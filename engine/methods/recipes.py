"""What a recipe's answers are made of. The only importer of the single methods."""

from typing import assert_never

from engine.methods.base import Clipping, Method
from engine.methods.clipping import FactorClipping, FullRange, LearnedClipping, SearchedClipping
from engine.methods.losses import BlockLoss
from engine.recipe import Clipping as ClippingName
from engine.recipe import Recipe, Resolved
from engine.spec import QuantSpec

__all__ = ["method_of"]

CLIPPING_RATE = 1e-2
"""Of logits (OmniQuant)."""
FACTOR_RATE = 3e-3
"""Of factors around one."""
TRANSFORM_RATE = 5e-3
"""OmniQuant's, of factors."""
ROUNDING_RATE = 5e-3
"""Of offsets, in steps of the grid: two hundred steps cross from one code to the next."""
TUNING_RATE = 1e-3
"""Of the logarithms of scales, end to end."""
OMNIQUANT_LOGIT = 4.0


def method_of(spec: QuantSpec) -> Method:
    """Compose the methods that a spec asks for."""
    chosen = spec.resolved
    has_factors = chosen.clipping is ClippingName.FACTORS
    return Method(
        equivalent_transform=chosen.equivalent_transform,
        clipping=_clipping(chosen, spec.recipe),
        factors=FactorClipping() if has_factors else FullRange(),
        second_order=chosen.second_order,
        rounding=chosen.rounding,
        compensation=chosen.compensation,
        loss=BlockLoss(own=chosen.own_input_loss, cosine=chosen.cosine_loss),
        attention_loss=chosen.attention_loss,
        end_to_end=chosen.end_to_end,
        end_to_end_epochs=chosen.end_to_end_epochs,
        clipping_rate=FACTOR_RATE if has_factors else CLIPPING_RATE,
        transform_rate=TRANSFORM_RATE,
        rounding_rate=ROUNDING_RATE,
        tuning_rate=TUNING_RATE,
        chooses_clips=chosen.clipping is not ClippingName.FULL,
        trains_clips=chosen.clipping is ClippingName.LEARNED,
        trains_factors=has_factors,
    )


def _clipping(chosen: Resolved, recipe: Recipe) -> Clipping:
    match chosen.clipping:
        case ClippingName.FULL:
            return FullRange()
        case ClippingName.SEARCHED | ClippingName.FACTORS:
            return SearchedClipping()
        case ClippingName.LEARNED:
            is_omniquant = recipe is Recipe.OMNIQUANT
            return LearnedClipping(OMNIQUANT_LOGIT if is_omniquant else None)
        case _:
            assert_never(chosen.clipping)

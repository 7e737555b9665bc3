"""Named recipes: which methods they compose. The only importer of the single methods."""

from typing import assert_never

from engine.methods.base import Method
from engine.methods.clipping import FullRange, LearnedClipping
from engine.methods.losses import OutputError
from engine.methods.rounding import Nearest
from engine.spec import Recipe

__all__ = ["method_of"]

CLIPPING_RATE = 1e-2


def method_of(recipe: Recipe) -> Method:
    """Compose the methods of a recipe."""
    match recipe:
        case Recipe.RTN:
            clipping: FullRange | LearnedClipping = FullRange()
        case Recipe.LWC | Recipe.OMNIQUANT | Recipe.FAST | Recipe.DEFAULT | Recipe.ACCURATE:
            clipping = LearnedClipping()
        case _:
            assert_never(recipe)
    return Method(
        transforms=(),
        clipping=clipping,
        rounding=Nearest(),
        loss=OutputError(),
        learning_rate=CLIPPING_RATE,
    )

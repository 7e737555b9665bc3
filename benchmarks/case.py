"""One row of the accuracy benchmark: a model, a configuration, a method, and what both share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, get_type_hints

from engine.recipe import Ingredients
from engine.spec import CalibrationSpec, QuantSpec, Recipe

__all__ = ["PATHS", "RECIPES", "Case", "Method"]


class Method(StrEnum):
    """Who quantizes."""

    RTN = "rtn"
    """Round to nearest, our recipe of that name."""
    LWC = "lwc"
    """Our recipe of that name."""
    ABQ_FAST = "abq-fast"
    """Our recipe `fast`."""
    ABQ = "abq"
    """Our recipe `default`."""
    ABQ_ACCURATE = "abq-accurate"
    """Our recipe `accurate`."""
    OMNIQUANT = "omniquant"
    """OmniQuant's setting, our recipe of that name."""
    AUTOROUND = "autoround"
    """AutoRound with its default settings, from its own package."""
    AUTOROUND_BEST = "autoround-best"
    """AutoRound with the 1000 steps a block of its recipe for best accuracy."""
    GPTQ = "gptq"
    """GPTQ as llm-compressor has it, from its own package."""


RECIPES: Mapping[Method, Recipe] = {
    Method.RTN: Recipe.RTN,
    Method.LWC: Recipe.LWC,
    Method.ABQ_FAST: Recipe.FAST,
    Method.ABQ: Recipe.DEFAULT,
    Method.ABQ_ACCURATE: Recipe.ACCURATE,
    Method.OMNIQUANT: Recipe.OMNIQUANT,
}
"""Our methods; the others are peers."""
PATHS = ("model", "text", "eval_text", "second_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that one process needs to measure one row."""

    model: Path
    config: str
    """The paper's notation: `w4a16`, `w2a16g64`."""
    method: Method
    text: Path | None
    """Calibration text; None takes the builtin one."""
    eval_text: Path
    """WikiText-2's test split as one text file."""
    second_text: Path | None
    """Another text; None takes the builtin evaluation text."""
    samples: int
    length: int
    """Tokens in a calibration window."""
    epochs: int
    seed: int
    eval_windows: int
    """At most this many of each text, from its start."""
    eval_length: int
    """Tokens in an evaluation window."""
    peer_steps: int | None
    """Steps that a peer trains each block for; None takes its own default."""
    device: str
    ingredients: Mapping[str, Any] = field(default_factory=dict)
    """Answers laid over those of our recipe, as a request writes them: an ablation."""

    @property
    def spec(self) -> QuantSpec:
        """The quantization asked for; a peer takes its widths from it."""
        calibration = CalibrationSpec(
            samples=self.samples, length=self.length, epochs=self.epochs, seed=self.seed
        )
        recipe = RECIPES.get(self.method, Recipe.RTN)
        return QuantSpec.from_notation(
            self.config,
            recipe=recipe,
            calibration=calibration,
            ingredients=Ingredients.from_json(self.ingredients),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its row from the others of a table."""
        named = {"config": self.config, "method": self.method.value}
        return named | ({"ingredients": dict(self.ingredients)} if self.ingredients else {})

    def settings(self) -> dict[str, Any]:
        """What rows of one table have in common."""
        record = self.to_json()
        for name in ("config", "method", "device", "ingredients"):
            del record[name]
        # where a file lies is of no interest to who reads the table
        return record | {
            name: None if record[name] is None else Path(record[name]).name for name in PATHS
        }

    def to_json(self) -> dict[str, Any]:
        """Write every field."""
        record = asdict(self)
        return record | {
            name: None if record[name] is None else str(record[name]) for name in PATHS
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        paths = {name: None if record[name] is None else Path(record[name]) for name in PATHS}
        known = {name: record[name] for name in get_type_hints(cls) if name not in PATHS}
        return cls(**{**known, **paths, "method": Method(record["method"])})

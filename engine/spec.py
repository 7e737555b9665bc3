"""What a quantization is: one torch-free vocabulary for request, engine and file."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

from engine.datasets import check_text
from engine.errors import SpecError
from engine.fields import check_flag, check_range, known_fields, read_choice, read_list
from engine.grid import PER_CHANNEL, SCALE_BITS, ZERO_POINT_BITS, WeightGrid
from engine.recipe import FULL_BITS, Ingredients, Recipe, Resolved, resolve
from engine.target import BitTarget

__all__ = [
    "FULL_BITS",
    "PER_CHANNEL",
    "SCALE_BITS",
    "ZERO_POINT_BITS",
    "CalibrationSpec",
    "LayerOverride",
    "QuantSpec",
    "Recipe",
    "WeightGrid",
]

GROUP_STEP = 32  # groups are whole words of the stored bit-planes
MAX_OVERRIDES = 65_536
"""A search writes one for each linear; a request may have fewer (`api.schemas`)."""
NOTATION = re.compile(r"w(\d+)(\*?)a(\d+)(\*?)(?:kv(\d+))?(?:g(\d+))?(?:kv(\d+))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """Which text calibrates, how much of it, and how long."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    dataset: str = "builtin"
    """`builtin`, `wikitext2`, `c4`, `ptb`, or `local:<root>/<file>` below an operator's root."""
    samples: int = 256
    """Windows of tokens."""
    length: int = 512
    """Tokens in a window."""
    epochs: int = 6
    """Passes over the samples for each decoder layer; 0 trains nothing."""
    batch: int = 8
    """Windows of one step."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("calibration.samples", self.samples, 1, 4096)
        check_range("calibration.length", self.length, 16, 32768)
        check_range("calibration.epochs", self.epochs, 0, 100)
        check_range("calibration.batch", self.batch, 1, 4096)
        check_range("calibration.seed", self.seed, 0, 2**31 - 1)
        check_text("calibration.dataset", self.dataset)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOverride:
    """Other bits for the linear layers whose full name matches a shell-style pattern."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    pattern: str
    """For example `*.down_proj` or `model.layers.0.*`."""
    w_bits: int | None = None
    """16 leaves the layer in full precision."""
    a_bits: int | None = None
    group_size: int | None = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            SpecError: naming the field, the value and what would do.
        """
        values = known_fields(cls, record, "overrides.")
        return cls(**{"pattern": None, **values})

    def __post_init__(self) -> None:
        _check_pattern(self.pattern)
        if self.w_bits is None and self.a_bits is None and self.group_size is None:
            raise SpecError("overrides", self.pattern, "set w_bits, a_bits or group_size")
        if self.w_bits is not None:
            check_range("overrides.w_bits", self.w_bits, 1, 8, also=FULL_BITS)
        if self.a_bits is not None:
            check_range("overrides.a_bits", self.a_bits, 2, 8, also=FULL_BITS)
        if self.group_size is not None:
            _check_group("overrides.group_size", self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """A whole quantization; the paper writes its bits as `w4a8`, `w2*a8`, `w4a16g64`, `w4a8kv8`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    w_bits: int
    a_bits: int = FULL_BITS
    q_bits: int = FULL_BITS
    """Queries after rotary embedding, for each token and head."""
    kv_bits: int = FULL_BITS
    group_size: int = PER_CHANNEL
    symmetric: bool = False
    bit_balance: bool = False
    half_step: bool = False
    """The four-level grid of true two bits, symmetric around zero without holding it (ParetoQ)."""
    overrides: tuple[LayerOverride, ...] = ()
    target: BitTarget | None = None
    """Asks for a search: it chooses the bits of every layer and records them as overrides."""
    recipe: Recipe = Recipe.DEFAULT
    ingredients: Ingredients = field(default_factory=Ingredients)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)

    def __post_init__(self) -> None:
        check_range("w_bits", self.w_bits, 1, 8)
        check_range("a_bits", self.a_bits, 2, 8, also=FULL_BITS)
        check_range("q_bits", self.q_bits, 2, 8, also=FULL_BITS)
        check_range("kv_bits", self.kv_bits, 2, 8, also=FULL_BITS)
        _check_group("group_size", self.group_size)
        for name in ("symmetric", "bit_balance", "half_step"):
            check_flag(name, getattr(self, name))
        if self.bit_balance and self.w_bits > 2:
            raise SpecError("bit_balance", self.bit_balance, "use w_bits 1 or 2 with it")
        if self.half_step and (self.w_bits > 2 or self.bit_balance):
            raise SpecError("half_step", self.half_step, "use w_bits 1 or 2, without bit_balance")
        if self.symmetric and self.w_bits == 1 and not self.bit_balance:
            raise SpecError("symmetric", self.symmetric, "with one bit add bit_balance")
        if len(self.overrides) > MAX_OVERRIDES:
            raise SpecError("overrides", len(self.overrides), f"use at most {MAX_OVERRIDES}")

    @classmethod
    def from_notation(cls, notation: str, **others: Any) -> Self:
        """Read the paper's notation; `others` are further fields.

        Raises:
            SpecError: if the text is not of the form `w<bits>[*]a<bits>[g<size>][kv<bits>]`.
        """
        match = NOTATION.fullmatch(notation.strip())
        if match is None or (match[5] and match[7]):
            raise SpecError("spec", notation, "write w<bits>[*]a<bits>[g<group size>][kv<bits>]")
        if match[4]:
            raise SpecError(
                "a_bits", f"{match[3]}*", "only weights can be bit-balanced; drop the *"
            )
        return cls(
            w_bits=int(match[1]),
            bit_balance=bool(match[2]),
            a_bits=int(match[3]),
            kv_bits=int(match[5] or match[7] or FULL_BITS),
            group_size=int(match[6]) if match[6] else PER_CHANNEL,
            **others,
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; unknown fields are refused.

        Raises:
            SpecError: naming the field, the value and what would do.
        """
        values = known_fields(cls, record, "")
        if "w_bits" not in values:
            raise SpecError("w_bits", None, "name the bits of the weights, 1 to 8")
        if "calibration" in values:
            values["calibration"] = CalibrationSpec(
                **known_fields(CalibrationSpec, values["calibration"], "calibration.")
            )
        overrides = read_list("overrides", values.get("overrides", ()))
        values["overrides"] = tuple(LayerOverride.from_json(each) for each in overrides)
        if values.get("target") is not None:
            values["target"] = BitTarget.from_json(values["target"])
        if "ingredients" in values:
            values["ingredients"] = Ingredients.from_json(values["ingredients"])
        recipe = read_choice("recipe", values.get("recipe", Recipe.DEFAULT), Recipe)
        return cls(**{**values, "recipe": recipe})

    def to_json(self) -> dict[str, Any]:
        """Write every field, as request and manifest hold them."""
        return {**asdict(self), "overrides": [asdict(each) for each in self.overrides]}

    @property
    def notation(self) -> str:
        """The paper's short form of the default bits."""
        star = "*" if self.bit_balance else ""
        group = "" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        kv = "" if self.kv_bits == FULL_BITS else f"kv{self.kv_bits}"
        return f"w{self.w_bits}{star}a{self.a_bits}{group}{kv}"

    @property
    def trained_epochs(self) -> int:
        """Passes over the samples for each decoder layer, by recipe and calibration."""
        return self.calibration.epochs * self.resolved.epochs_factor

    @property
    def resolved(self) -> Resolved:
        """What the recipe and the ingredients come to."""
        whole = self.group_size == PER_CHANNEL
        bits = self.narrowest_inputs
        return resolve(self.recipe, self.ingredients, a_bits=bits, per_channel=whole)

    @property
    def narrowest_inputs(self) -> int:
        """The least bits that the inputs of a layer may be rounded to, by override or search."""
        pinned = [each.a_bits for each in self.overrides if each.w_bits != FULL_BITS]
        choices = () if self.target is None else self.target.a_choices
        return min(each for each in (self.a_bits, *pinned, *choices) if each is not None)

    def weight_grid(self, layer: str) -> WeightGrid | None:
        """The grid of one linear layer by its full name; None leaves it in full precision."""
        bits, group_size = self.w_bits, self.group_size
        for override in self._matching(layer):
            bits = override.w_bits if override.w_bits is not None else bits
            group_size = override.group_size if override.group_size is not None else group_size
        if bits == FULL_BITS:
            return None
        balanced = self.bit_balance and bits <= 2
        return WeightGrid(
            bits=bits,
            group_size=group_size,
            symmetric=self.symmetric and (bits > 1 or balanced),
            bit_balance=balanced,
            half_step=self.half_step and bits <= 2,
        )

    def activation_bits(self, layer: str) -> int:
        """Bits of the inputs of one linear layer by its full name."""
        bits = self.a_bits
        for override in self._matching(layer):
            bits = override.a_bits if override.a_bits is not None else bits
        return bits

    def _matching(self, layer: str) -> list[LayerOverride]:
        return [each for each in self.overrides if fnmatchcase(layer, each.pattern)]


def _check_pattern(value: Any) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 256:
        raise SpecError("overrides.pattern", value, "use 1 to 256 characters")


def _check_group(name: str, value: Any) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or (value != PER_CHANNEL and (value < 1 or value % GROUP_STEP)):
        raise SpecError(name, value, f"use a multiple of {GROUP_STEP}, or -1 for a whole channel")

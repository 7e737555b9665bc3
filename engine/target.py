"""What a bit search shall reach, and the widths it may choose from; torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from engine.errors import SpecError
from engine.fields import check_number, check_range, known_fields, read_list

__all__ = ["BitTarget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitTarget:
    """The goal of a search for the bits of every linear layer; exactly one of the first three."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    average_bits: float | None = None
    """Stored bits per quantized weight, scales and zero-points included."""
    max_bytes: int | None = None
    """All stored tensors of the result."""
    perplexity_increase: float | None = None
    """Allowed ratio to full precision, less one: 0.05 allows five per cent."""
    w_choices: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    a_choices: tuple[int, ...] = ()
    """Widths of activations; none keeps the spec's `a_bits` everywhere."""

    def __post_init__(self) -> None:
        goals = [self.average_bits, self.max_bytes, self.perplexity_increase]
        if sum(each is not None for each in goals) != 1:
            raise SpecError(
                "target", goals, "set one of average_bits, max_bytes and perplexity_increase"
            )
        if self.average_bits is not None:
            check_number("target.average_bits", self.average_bits, 1, 16)
        if self.max_bytes is not None:
            check_range("target.max_bytes", self.max_bytes, 1, 1 << 50)
        if self.perplexity_increase is not None:
            check_number("target.perplexity_increase", self.perplexity_increase, 1e-4, 100)
        if not self.w_choices:
            raise SpecError("target.w_choices", self.w_choices, "name at least one width")
        for bits in self.w_choices:
            check_range("target.w_choices", bits, 1, 8)
        for bits in self.a_choices:
            check_range("target.a_choices", bits, 2, 8, also=16)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            SpecError: naming the field, the value and what would do.
        """
        values = known_fields(cls, record, "target.")
        for name in ("w_choices", "a_choices"):
            if name in values:
                values[name] = read_list(f"target.{name}", values[name])
        return cls(**values)

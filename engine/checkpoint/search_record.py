"""Why every layer got its bits: what a bit search measured, chose and promised; torch-free.

Losses are KL divergences of the logits in nats per token, of the one layer alone; prices are
nats per MiB of stored weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from engine.target import BitTarget

__all__ = ["ChosenBits", "SearchRecord"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenBits:
    """One linear, or the same linear of all experts of a layer, by its name or their pattern."""

    name: str
    w_bits: int
    a_bits: int
    is_pinned: bool
    """True where an override of the request left no choice of weight bits."""
    w_losses: Mapping[str, float]
    """Measured loss at every width of the weights; widths are texts, as in JSON."""
    a_losses: Mapping[str, float]
    """The same for its inputs."""
    price_of_last: float | None
    """What the step up from the next cheaper width saved; None at the cheapest."""
    price_of_next: float | None
    """What the step to the next dearer width would save; None at the dearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecord:
    """One search."""

    target: BitTarget
    windows: int
    length: int
    """Tokens in a window."""
    anchors: int
    """Widths of each layer that were followed to the logits; others are scaled from those."""
    flops: float
    predicted_weight_loss: float
    predicted_activation_loss: float
    predicted_average_bits: float
    """Stored bits per quantized weight."""
    predicted_bytes: int
    """All stored tensors."""
    achieved_average_bits: float | None = None
    """Counted in the result; None until it is written."""
    price: float | None
    """The least that any layer's last step saved: the exchange rate of the whole model. None where
    no layer was free to be narrower."""
    layers: tuple[ChosenBits, ...]

    @property
    def predicted_loss(self) -> float:
        """Expected KL divergence of the logits before calibration, in nats per token."""
        return self.predicted_weight_loss + self.predicted_activation_loss

    @property
    def chosen(self) -> dict[str, tuple[int, int]]:
        """Weight and activation bits by name."""
        return {each.name: (each.w_bits, each.a_bits) for each in self.layers}

    def achieving(self, average_bits: float) -> Self:
        """Add what was counted."""
        return replace(self, achieved_average_bits=average_bits)

    def summary(self) -> dict[str, Any]:
        """What the service keeps; the manifest has all of it."""
        return {
            "predicted_average_bits": self.predicted_average_bits,
            "predicted_loss": self.predicted_loss,
            "bits": self.chosen,
        }

    def to_json(self) -> dict[str, Any]:
        """Write every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            SpecError: if the target is not possible.
            KeyError: if target or layers are missing.
            TypeError: if a field is missing or unknown.
        """
        return cls(
            **{
                **record,
                "target": BitTarget.from_json(record["target"]),
                "layers": tuple(ChosenBits(**each) for each in record["layers"]),
            }
        )

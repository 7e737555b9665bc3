"""What came out of a quantization, as the service keeps it."""

from dataclasses import dataclass
from typing import Any

from engine.checkpoint.evaluation import Evaluation
from engine.checkpoint.search_record import SearchRecord

__all__ = ["QuantReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantReport:
    """What came out."""

    bits_per_weight: float
    """Counted from the stored tensors, scales and zero-points included."""
    promised_bits_per_weight: float
    bytes_fp: int
    """All parameters of the source in 16 bits."""
    bytes_quant: int
    """All stored tensors of the result."""
    evaluation: Evaluation
    seconds: float
    layers: int
    """Decoder layers."""
    manifest_sha256: str
    search: SearchRecord | None = None
    """Where a search chose the bits."""

    def to_json(self) -> dict[str, Any]:
        """Write what the service keeps."""
        measured = self.evaluation.perplexity
        return {
            "bits_per_weight": self.bits_per_weight,
            "promised_bits_per_weight": self.promised_bits_per_weight,
            "bytes_fp": self.bytes_fp,
            "bytes_quant": self.bytes_quant,
            "perplexity": None
            if measured is None
            else {"fp": measured.fp, "quant": measured.quant, "tokens": measured.tokens},
            "evaluation_status": self.evaluation.status.value,
            "evaluation": self.evaluation.to_json(),
            "seconds": self.seconds,
            "layers": self.layers,
            "manifest_sha256": self.manifest_sha256,
            "search": None if self.search is None else self.search.summary(),
        }

"""How many bits a checkpoint takes, counted from the tensors that were stored.

    per_weight = 8 * (bytes of packed codes, scales and zero-points) / quantized weights

Embeddings, the output head, norms, biases and layers left in full precision are counted apart.
"""

from dataclasses import dataclass, field

import torch

from engine.architecture import Architecture
from engine.checkpoint.format import PACKED_SUFFIX, QUANT_SUFFIXES
from engine.spec import QuantSpec

__all__ = ["BitTally", "StoredBits"]

SOURCE_BYTES_PER_WEIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBits:
    """Measured sizes of a checkpoint."""

    per_weight: float
    """Bits per quantized weight, scales and zero-points included."""
    promised_per_weight: float
    """What the spec promises for the same layers."""
    quantized_weights: int
    packed_bytes: int
    """Packed codes, scales and zero-points."""
    other_bytes: int
    """Norms, biases and linear layers left in full precision."""
    embedding_bytes: int
    """Input embedding and, where it is stored, the output head."""
    fp_bytes: int
    """The same model in 16 bits."""


@dataclass(slots=True, kw_only=True)
class BitTally:
    """Counts tensors as they are written."""

    architecture: Architecture
    spec: QuantSpec
    _weights: dict[str, int] = field(default_factory=dict)
    _packed_bytes: int = 0
    _other_bytes: int = 0
    _embedding_bytes: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Count one stored tensor."""
        if name.endswith(QUANT_SUFFIXES):
            self._packed_bytes += tensor.nbytes
            if name.endswith(PACKED_SUFFIX):
                self._weights[name.removesuffix(PACKED_SUFFIX)] = tensor.shape[1]
        elif name in (self.architecture.embedding_name, self.architecture.head_name):
            self._embedding_bytes += tensor.nbytes
        else:
            self._other_bytes += tensor.nbytes

    def total(self) -> StoredBits:
        """Relate the bytes to the weights they stand for."""
        widths = {each.name: each.in_features for each in self.architecture.linears}
        # rows come from the tensors, columns from the architecture: planes are padded to words
        weights = {name: rows * widths[name] for name, rows in self._weights.items()}
        quantized = sum(weights.values())
        promised = sum(
            count * self._promised(name, widths[name]) for name, count in weights.items()
        )
        return StoredBits(
            per_weight=8 * self._packed_bytes / max(1, quantized),
            promised_per_weight=promised / max(1, quantized),
            quantized_weights=quantized,
            packed_bytes=self._packed_bytes,
            other_bytes=self._other_bytes,
            embedding_bytes=self._embedding_bytes,
            fp_bytes=SOURCE_BYTES_PER_WEIGHT * self.architecture.parameter_count,
        )

    def _promised(self, name: str, in_features: int) -> float:
        grid = self.spec.weight_grid(name)
        assert grid is not None, f"{name} is packed although the spec leaves it in full precision"
        return grid.promised_bits(in_features)

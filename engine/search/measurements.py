"""What a bit search has measured, kept on disk so that no later attempt measures it again.

One JSON file in the job's state directory, rewritten whole after every few blocks. It belongs to
a fingerprint of everything that the measurements depend on; how many bits the target allows is
no part of that, so another target with the same widths starts from what is there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from engine.checkpoint.durable import write_atomically
from engine.errors import CheckpointInvalid

__all__ = ["Measured", "MeasurementStore", "UnitMeasurements"]

FILE_NAME = "search.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One unit at one width, everything else in full precision."""

    error: float
    """Of the block's output, relative to each token's size: mean of |y' - y|^2 / |y|^2."""
    divergence: float | None = None
    """KL of the logits in nats per token; None where it was not followed that far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitMeasurements:
    """One unit at every width that was asked for; 16 bits change nothing and are not measured."""

    weights: Mapping[int, Measured]
    activations: Mapping[int, Measured]

    def to_json(self) -> dict[str, Any]:
        """Write both tables; JSON has only texts as names."""
        return {
            name: {str(bits): [each.error, each.divergence] for bits, each in table.items()}
            for name, table in (("weights", self.weights), ("activations", self.activations))
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        tables = [
            {
                int(bits): Measured(error=error, divergence=divergence)
                for bits, (error, divergence) in record[name].items()
            }
            for name in ("weights", "activations")
        ]
        return cls(weights=tables[0], activations=tables[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementStore:
    """The measurements of one search, by the name of their unit."""

    path: Path
    mark: str
    units: dict[str, UnitMeasurements]

    @classmethod
    def open(cls, directory: Path, mark: str) -> Self:
        """Read what an earlier attempt with the same fingerprint measured; else start empty."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        return cls(path=path, mark=mark, units=_read(path, mark) if path.is_file() else {})

    def add(self, units: Mapping[str, UnitMeasurements]) -> None:
        """Make more measurements durable."""
        self.units.update(units)
        record = {
            "fingerprint": self.mark,
            "units": {name: each.to_json() for name, each in self.units.items()},
        }
        try:
            content = json.dumps(record, sort_keys=True, allow_nan=False)
        except ValueError as error:
            raise CheckpointInvalid("a measurement of the bit search is not finite") from error
        write_atomically(self.path, content.encode())


def _read(path: Path, mark: str) -> dict[str, UnitMeasurements]:
    try:
        record = json.loads(path.read_bytes())
        if record["fingerprint"] != mark:
            return {}
        return {name: UnitMeasurements.from_json(each) for name, each in record["units"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        # torn or foreign: measuring again is always right
        return {}

"""New lines of several log files, in the order in which they are found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LogLine", "LogLines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line and the file it came from."""

    source: str
    text: str


class LogLines:
    """Follows files that grow; what they held before is left out."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._offsets = {path: path.stat().st_size if path.exists() else 0 for path in paths}

    def read(self) -> Iterator[LogLine]:
        """Yield whole lines written since the last call."""
        for path, offset in self._offsets.items():
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(offset)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._offsets[path] = offset + len(whole) + len(newline)
            for line in whole.decode(errors="replace").splitlines():
                yield LogLine(source=path.stem, text=line)

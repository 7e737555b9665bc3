"""Numbers as a person reads them: bytes, durations, losses, ages."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "age_text",
    "bits_text",
    "bytes_text",
    "change_text",
    "divergence_text",
    "duration_text",
    "loss_text",
]


def bytes_text(count: float | None) -> str:
    """Decimal units, as disks and download pages count them: `98.4 MB`."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def bits_text(average: float, loss: float, bits: Mapping[str, Sequence[int]]) -> str:
    """What a bit search chose: `3.498 bits per weight (layers: 4 w2a8, 3 w4a8), KL 0.043`."""
    counts = Counter((w_bits, a_bits) for w_bits, a_bits in bits.values())
    layers = ", ".join(f"{counts[each]} w{each[0]}a{each[1]}" for each in sorted(counts))
    return f"{average:.3f} bits per weight (layers: {layers}), KL {loss_text(loss)}"


def duration_text(seconds: float | None) -> str:
    """Two units at most: `8.4 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def loss_text(loss: float | None) -> str:
    """Three digits that count."""
    return "-" if loss is None else f"{loss:.3g}"


def change_text(before: float | None, after: float | None) -> str:
    """How much smaller the second number is: `-38 %`."""
    if before is None or after is None or before == 0:
        return "-"
    percent = (after / before - 1) * 100
    return f"{percent:+.0f} %" if abs(percent) >= 9.5 else f"{percent:+.1f} %"


def divergence_text(divergence: Mapping[str, Any]) -> str:
    """How far predictions moved: `KL 0.0213 a token, 91.2 % the same`."""
    agreement = 100 * divergence["top1_agreement"]
    return f"KL {divergence['mean']:.4f} a token, {agreement:.1f} % the same"


def age_text(moment: str | None, now: datetime | None = None) -> str:
    """How long ago an ISO 8601 time was: `5 min ago`."""
    if moment is None:
        return "-"
    then = datetime.fromisoformat(moment)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "just now"

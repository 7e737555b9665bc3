"""Where a checkpoint appears, and what may have to go for it: an earlier result, nothing else."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from engine.checkpoint.durable import sync_path
from engine.checkpoint.format import MANIFEST_NAME
from engine.errors import SpecError

__all__ = ["check_destination", "partial_of", "publish"]


def check_destination(out_dir: Path, apart_from: Iterable[Path] = ()) -> None:
    """Refuse a place where something else than a checkpoint would be lost.

    Args:
        out_dir: may be missing, empty, or an earlier result.
        apart_from: directories that are read or kept; neither may hold the other.

    Raises:
        SpecError: naming the place and what would do.
    """
    place = out_dir.resolve()
    for other in apart_from:
        kept = other.resolve()
        if any(each.is_relative_to(kept) for each in (place, partial_of(place))) or (
            kept.is_relative_to(place)
        ):
            raise SpecError("out_dir", str(out_dir), f"name a directory apart from {other}")
    if out_dir.is_symlink() or (out_dir.exists() and not out_dir.is_dir()):
        raise SpecError("out_dir", str(out_dir), "name a directory; this is a file or a link")
    if out_dir.is_dir() and not (out_dir / MANIFEST_NAME).is_file() and any(out_dir.iterdir()):
        raise SpecError(
            "out_dir",
            str(out_dir),
            f"it holds something else than a checkpoint (no {MANIFEST_NAME}) and would be replaced;"
            " name a new or empty directory",
        )


def partial_of(out_dir: Path) -> Path:
    """Where the checkpoint is while it is written."""
    return out_dir.with_name(f".{out_dir.name}.partial")


def publish(out_dir: Path) -> None:
    """Make every byte of the partial directory durable, then rename it into place.

    Raises:
        SpecError: if by now something is there that is no checkpoint.
    """
    partial = partial_of(out_dir)
    for path in [*partial.iterdir(), partial]:
        sync_path(path)
    check_destination(out_dir)
    replaced = out_dir.with_name(f".{out_dir.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out_dir.exists():
        # a deletion that is cut off would leave something that is no checkpoint any more
        out_dir.replace(replaced)
    partial.replace(out_dir)
    sync_path(out_dir.parent)
    shutil.rmtree(replaced, ignore_errors=True)

"""Where finished artifacts are kept: the port `ObjectStore`."""

from pathlib import Path
from typing import BinaryIO, Protocol

__all__ = ["ObjectStore"]


class ObjectStore(Protocol):
    """Keeps files under keys of the form `<artifact_id>/<path>`.

    A key is one to ten components of `[A-Za-z0-9_.-]`, none of them starting with a dot; every
    method raises ValueError for another. Objects are immutable once complete.
    """

    def put_file(self, key: str, path: Path) -> None:
        """Keep a file; readers see all of it or nothing, also after a power cut.

        The caller may replace or remove its file afterwards, but not write into it.
        """

    def path_of(self, key: str) -> Path:
        """A local file with the object's bytes; must not be written to.

        Raises:
            FileNotInArtifact: there is no such object.
        """

    def open(self, key: str) -> BinaryIO:
        """The object's bytes from the start; the caller closes it.

        Raises:
            FileNotInArtifact: there is no such object.
        """

    def exists(self, key: str) -> bool:
        """Whether the object is complete."""

    def delete(self, prefix: str) -> None:
        """Remove the object of this key or all below it; nothing happens if there are none."""

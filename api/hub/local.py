"""Models below folders that the operator configured: `local:<root>/<folder>`."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from typing_extensions import override

from api.errors import ModelNotFound, RevisionNotFound
from api.hub.base import ModelFacts, ModelSource, OnProgress, RemoteFile, ResolvedModel
from api.hub.inspection import inspect_model
from api.hub.names import LocalName, check_revision
from api.hub.transfer import OnBytes, Transfer

__all__ = ["LocalHub", "find_below", "inspect_folder"]

WHOLE_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 16
SAMPLES = 16
"""A large file is recognized by so many samples; hashing hundreds of GB would take minutes."""


class LocalHub(ModelSource):
    """A `ModelSource` on a file system. It never changes what it reads."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self._roots = roots

    @override
    def resolve(self, model: str, revision: str | None) -> ResolvedModel:
        """Name the folder's content by a hash; an edited folder is another revision."""
        folder = self._locate(model)
        files = tuple(_list_files(folder))
        sha = _fingerprint(folder, files)
        if revision is not None:
            check_revision(revision)
        if revision not in (None, sha):
            raise RevisionNotFound(
                f"{model} is at revision {sha} now; ask for that, or for none.", param="revision"
            )
        return ResolvedModel(model=model, sha=sha, files=files)

    @override
    def inspect(self, resolved: ResolvedModel) -> ModelFacts:
        """Read config and headers from the folder."""
        return inspect_folder(resolved, self._locate(resolved.model))

    @override
    def download(self, resolved: ResolvedModel, folder: Path, on_progress: OnProgress) -> None:
        """Give the files a second name in `folder`, or copy them to another file system."""
        source = self._locate(resolved.model)
        facts = self.inspect(resolved)

        def bring(file: RemoteFile, part: Path, on_bytes: OnBytes) -> None:
            on_bytes(0)
            part.unlink(missing_ok=True)
            original = (source / file.path).resolve()
            try:
                # a link keeps these bytes even if the operator replaces the model meanwhile
                part.hardlink_to(original)
            except OSError:
                _copy(original, part, on_bytes)

        Transfer(bring, folder).run(facts.fetched_files, on_progress)

    def _locate(self, model: str) -> Path:
        name = LocalName(model, param="model")
        folder = find_below(self._roots, name)
        if folder is None or not folder.is_dir():
            raise ModelNotFound(
                f"There is no {model}; the operator's roots are called"
                f" {', '.join(sorted(self._roots)) or 'nothing: none is configured'}.",
                param="model",
            )
        return folder


def inspect_folder(resolved: ResolvedModel, folder: Path) -> ModelFacts:
    """Collect the facts of a model from a local folder with its files.

    Raises:
        UnsupportedFormat: about the weights.
        ConfigRejected: about the config or the tokenizer.
    """

    def read(path: str, start: int, length: int) -> bytes:
        with (folder / path).open("rb") as content:
            content.seek(start)
            return content.read(length)

    return inspect_model(resolved, read)


def find_below(roots: Mapping[str, Path], name: LocalName) -> Path | None:
    """The real path that a local name means, or None if there is none inside its root."""
    root = roots.get(name.root)
    if root is None:
        return None
    path = root.joinpath(*name.parts).resolve()
    return path if path.exists() and path.is_relative_to(root.resolve()) else None


def _list_files(folder: Path) -> Iterator[RemoteFile]:
    for path in sorted(folder.iterdir()):
        # a link to a place outside of the model's folder is not part of the model
        is_inside = path.resolve().is_relative_to(folder)
        if path.is_file() and is_inside and not path.name.startswith("."):
            yield RemoteFile(path=path.name, bytes=path.stat().st_size)


def _fingerprint(folder: Path, files: tuple[RemoteFile, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.bytes}\0".encode())
        with (folder / file.path).open("rb") as content:
            if file.bytes <= WHOLE_BYTES:
                digest.update(content.read())
                continue
            for index in range(SAMPLES):
                content.seek(index * (file.bytes - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    # as long as a commit, so that one column and one rule hold both
    return digest.hexdigest()[:40]


def _copy(original: Path, part: Path, on_bytes: OnBytes) -> None:
    with original.open("rb") as source, part.open("wb") as copy:
        while chunk := source.read(WHOLE_BYTES):
            copy.write(chunk)
            on_bytes(copy.tell())
    shutil.copystat(original, part)

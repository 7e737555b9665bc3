"""The safetensors files of a model directory, read tensor by tensor through memory maps."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointInvalid, UnsupportedModel
from engine.families.stored import StoredPart

__all__ = ["TensorFiles", "TensorHeader"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """What a file says of a tensor before its values."""

    name: str
    """The engine's."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: `BF16`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFiles:
    """Which file holds which tensor."""

    directory: Path
    file_of: dict[str, str]
    """Tensor name to file name."""
    parts: Mapping[str, StoredPart] = field(default_factory=dict)
    """What lies in the files under another name, or as a part of something larger."""

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the index, or the header of the only file.

        Raises:
            UnsupportedModel: if there are no safetensors files.
            CheckpointInvalid: if the index points outside the directory or a file is missing.
        """
        if (directory / INDEX_NAME).is_file():
            return cls(directory=directory, file_of=_read_index(directory))
        if not (directory / SINGLE_NAME).is_file():
            raise UnsupportedModel(
                "files", "the model has no safetensors weights; convert it, pickles are never read"
            )
        with _opened(directory / SINGLE_NAME) as tensors:
            return cls(directory=directory, file_of=dict.fromkeys(tensors.keys(), SINGLE_NAME))

    @property
    def files(self) -> list[Path]:
        """Every weight file, sorted by name."""
        return [self.directory / name for name in sorted(set(self.file_of.values()))]

    def with_parts(self, parts: Mapping[str, StoredPart]) -> Self:
        """Read these names as the parts that they are."""
        return replace(self, parts=parts)

    def read(
        self,
        names: Iterable[str],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> dict[str, torch.Tensor]:
        """Load some tensors, converted to `dtype` where one is given, on the host by default.

        Raises:
            CheckpointInvalid: naming the tensor that is missing or the file that is broken.
        """
        # a clone, so that nothing points into the map of a file that may be deleted;
        # converted on the device, so that half the bytes cross
        return {name: tensor.to(device).to(dtype, copy=True) for name, tensor in self.stream(names)}

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Give some tensors one after the other, file by file, as they are stored.

        A tensor may point into the map of its file; nothing else is in memory.

        Raises:
            CheckpointInvalid: as `read`.
        """
        for file, members in self._by_file(names).items():
            with _opened(self.directory / file) as tensors:
                for name, part in members.items():
                    yield name, _take(tensors, part, file)

    def headers(self, names: Iterable[str]) -> Iterator[TensorHeader]:
        """Say what the files promise of some tensors; no weight is read.

        Raises:
            CheckpointInvalid: as `read`.
        """
        for file, members in self._by_file(names).items():
            with _opened(self.directory / file) as tensors:
                for name, part in members.items():
                    whole = _slice_of(tensors, part, file)
                    shape = part.shape(tuple(whole.get_shape()))
                    yield TensorHeader(name=name, shape=shape, dtype=str(whole.get_dtype()))

    def _by_file(self, names: Iterable[str]) -> dict[str, dict[str, StoredPart]]:
        by_file: dict[str, dict[str, StoredPart]] = {}
        for name in names:
            part = self.parts.get(name, StoredPart(tensor=name))
            if part.tensor not in self.file_of:
                raise CheckpointInvalid(f"the model lacks the tensor {name}")
            by_file.setdefault(self.file_of[part.tensor], {})[name] = part
        return by_file


def _take(tensors: Any, part: StoredPart, file: str) -> torch.Tensor:
    whole = _slice_of(tensors, part, file)
    if part.expert is None:
        tensor: torch.Tensor = tensors.get_tensor(part.tensor)
        return tensor
    taken: torch.Tensor = whole[part.expert, part.rows(tuple(whole.get_shape()))]
    return taken


def _slice_of(tensors: Any, part: StoredPart, file: str) -> Any:
    """Find the tensor that holds a part, unread."""
    try:
        whole = tensors.get_slice(part.tensor)
    except SafetensorError as error:
        raise CheckpointInvalid(f"{file} lacks the tensor {part.tensor}") from error
    shape = tuple(whole.get_shape())
    if part.expert is not None and not part.shape(shape):
        raise CheckpointInvalid(f"{part.tensor} of shape {shape} holds no expert {part.expert}")
    return whole


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_NAME
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointInvalid(f"{INDEX_NAME} is larger than {MAX_INDEX_BYTES} bytes")
    try:
        file_of = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointInvalid(f"{INDEX_NAME} holds no weight_map") from error
    if not isinstance(file_of, dict):
        raise CheckpointInvalid(f"{INDEX_NAME} holds no weight_map")
    for name in {str(file) for file in file_of.values()}:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointInvalid(f"{INDEX_NAME} names {name!r}, which is no file of the model")
        if not (directory / name).is_file():
            raise CheckpointInvalid(f"{name} is missing")
    return {str(tensor): str(file) for tensor, file in file_of.items()}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointInvalid(f"{path.name} is no readable safetensors file") from error

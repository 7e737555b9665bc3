"""Joins the quantized linears of the store with what stays as it was in the source."""

from collections.abc import Iterator

import torch

from engine.calibration.resume import BlockStore
from engine.errors import CheckpointInvalid
from engine.models.loading import SourceModel

__all__ = ["merged_tensors"]


def merged_tensors(source: SourceModel, store: BlockStore) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the quantized model in the order of the forward pass.

    What is not quantized keeps the dtype that the source stored; one block is in memory.

    Raises:
        CheckpointInvalid: if a block is missing from the store.
    """
    architecture, family = source.architecture, source.architecture.family
    names = [name for name in source.skeleton.state_dict() if not source.is_tied(name)]
    entry = tuple(f"{name}." for name in (family.embedding, *family.beside_embedding))
    yield from _stored(source, [name for name in names if name.startswith(entry)])
    for index in range(architecture.layers):
        block = architecture.layer_name(index)
        saved = store.load(index)
        if saved is None:
            raise CheckpointInvalid(f"the calibration of {block} is missing")
        prefix = f"{block}."
        quantized = {prefix + name.rpartition(".")[0] + ".weight" for name in saved.tensors}
        kept = [name for name in names if name.startswith(prefix) and name not in quantized]
        yield from _stored(source, kept)
        for name, tensor in saved.tensors.items():
            yield prefix + name, tensor
    before = (*entry, f"{family.layers}.")
    yield from _stored(source, [name for name in names if not name.startswith(before)])


def _stored(source: SourceModel, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    found = source.tensors.read(names)
    for name in names:
        yield name, found[name]

"""Joins the quantized linears of the store with what stays as it was in the source."""

from collections.abc import Iterator

import torch

from engine.calibration.restore import REMAINDER
from engine.calibration.resume import BlockStore
from engine.checkpoint.format import PACKED_SUFFIX
from engine.errors import CheckpointInvalid
from engine.models.blocks import BlockModel
from engine.models.loading import SourceModel

__all__ = ["merged_tensors"]


def merged_tensors(
    source: SourceModel, store: BlockStore, model: BlockModel
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the quantized model in the order of the forward pass.

    What is not quantized keeps the dtype that the source stored; one block is in memory.

    Args:
        source: as it lies on disk.
        store: what was quantized.
        model: what was calibrated: the source, or its rotated form, whose tensors are rounded to
            the source's dtype (by at most 2^-9 of a value in bfloat16; folded norms are ones).

    Raises:
        CheckpointInvalid: if a block is missing from the store.
    """
    architecture, family = source.architecture, source.architecture.family
    names = [name for name in source.skeleton.state_dict() if not source.is_tied(name)]
    entry = tuple(f"{name}." for name in (family.embedding, *family.beside_embedding))
    yield from _stored(source, [name for name in names if name.startswith(entry)])
    found = store.load_tuned()
    tuned = {} if found is None else found.tensors
    for index in range(architecture.layers):
        block = architecture.layer_name(index)
        saved = store.load(index)
        if saved is None:
            raise CheckpointInvalid(f"the calibration of {block} is missing")
        prefix = f"{block}."
        packed = [name for name in saved.tensors if name.endswith(PACKED_SUFFIX)]
        replaced = {f"{prefix}{name.removesuffix(PACKED_SUFFIX)}.weight" for name in packed}
        replaced |= {prefix + name for name in saved.tensors}
        kept = [name for name in names if name.startswith(prefix) and name not in replaced]
        same = model is source
        plain = _stored(source, kept) if same else _changed(source, model, index, kept)
        for name, tensor in plain:
            yield name, tuned.get(name, tensor)
        for name, tensor in saved.tensors.items():
            if name.endswith(f".{REMAINDER}"):
                continue
            yield prefix + name, tuned.get(prefix + name, tensor)
    before = (*entry, f"{family.layers}.")
    yield from _stored(source, [name for name in names if not name.startswith(before)])


def _changed(
    source: SourceModel, model: BlockModel, index: int, names: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    dtypes = {name: each.dtype for name, each in _stored(source, names)}
    prefix = f"{source.architecture.layer_name(index)}."
    tensors = model.load_block(index).state_dict()
    for name in names:
        yield name, tensors[name.removeprefix(prefix)].to(dtypes[name])


def _stored(source: SourceModel, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    found = source.tensors.read(names)
    for name in names:
        yield name, found[name]

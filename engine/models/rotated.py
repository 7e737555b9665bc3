"""A model with its residual stream and its heads rotated: the same function, flatter activations.

    embedding          e                    e R
    norm -> reader     x g W^T              (x R) (W diag(g) R)^T       the norm's weight becomes 1
    writer             y W^T + b            y (R^T W)^T + b R
    v_proj -> o_proj   v, W                 v H, W H                    in every head of D channels
    final norm         n(x)                 n(x R^T)

R is orthogonal, so ``rms(x R) = rms(x)`` and every norm gives the rotated value of what it gave.
Embedding and head stay as they are: their weights may be one tensor. QuaRot, arXiv:2404.00456,
section 4; computed in float32, the function is kept to the rounding of float32.

Shape legend: N rows, K columns, H hidden size, D dimensions of a head.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from typing_extensions import override

from engine.architecture import Architecture
from engine.families.base import ChannelPair, PairKind
from engine.models.blocks import BlockModel
from engine.modules.rotated import ResidualRotation, RotatedEmbedding, UnrotatedNorm
from engine.numerics.hadamard import rotate_columns, rotate_rows
from engine.orders import block_of
from engine.rotation import Rotation, check_rotation

__all__ = ["RotatedModel", "install_rotation", "rotated"]


def rotated(source: BlockModel, rotation: Rotation) -> BlockModel:
    """See a model in its rotated form; the source itself where only inputs rotate online.

    Raises:
        SpecError: if the family cannot be rotated.
    """
    check_rotation(source.architecture, rotation)
    return source if rotation.seed is None else RotatedModel(source=source, seed=rotation.seed)


def install_rotation(model: nn.Module, architecture: Architecture, rotation: Rotation) -> None:
    """Put the ends of a rotated stream into a whole model whose layers are rotated already.

    Raises:
        SpecError: if the family cannot be rotated.
        UnsupportedModel: if its final norm is none that is known.
    """
    check_rotation(architecture, rotation)
    if rotation.seed is None:
        return
    family = architecture.family
    embedding = model.get_submodule(family.embedding)
    assert isinstance(embedding, nn.Embedding), f"{family.embedding} is no embedding"
    norm = model.get_submodule(family.final_norm)
    model.set_submodule(family.embedding, RotatedEmbedding(embedding, rotation.seed))
    model.set_submodule(family.final_norm, UnrotatedNorm.of(norm, rotation.seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class RotatedModel:
    """A `BlockModel` around another one."""

    source: BlockModel
    seed: int

    @property
    def architecture(self) -> Architecture:
        """The sizes."""
        return self.source.architecture

    @property
    def skeleton(self) -> nn.Module:
        """The source's; rotations change neither names nor shapes."""
        return self.source.skeleton

    def load_embedding(self) -> torch.Tensor:
        """The rotated input embedding ``[vocab, hidden]``."""
        rows: torch.Tensor = self._residual()(self.source.load_embedding())
        return rows

    @torch.no_grad()
    def load_block(self, index: int) -> nn.Module:
        """Decoder layer `index`, folded and rotated; the source's own layer is not written to."""
        block = _copy_structure(self.source.load_block(index))
        pairs = self.architecture.pairs
        for pair in pairs:
            if pair.kind is PairKind.NORM:
                _fold_norm(block, pair)
            elif pair.head_dim is not None:
                _rotate_heads(block, pair, block_of(pair.head_dim))
        self._rotate_residual(block, pairs)
        return block

    def load_head(self) -> nn.Module:
        """Final norm and output head: rotated hidden states in, logits out."""
        return nn.Sequential(_Unrotation(self._residual()), self.source.load_head())

    def load_part(self, name: str) -> nn.Module:
        """A module outside the layers; no rotated family has one beside the embedding."""
        return self.source.load_part(name)

    def _residual(self) -> ResidualRotation:
        return ResidualRotation(self.architecture.hidden, self.seed)

    def _rotate_residual(self, block: nn.Module, pairs: Iterable[ChannelPair]) -> None:
        device = next(block.parameters()).device
        rotation = self._residual().to(device)
        norms = [pair for pair in pairs if pair.kind is PairKind.NORM]
        for name in {name: None for pair in norms for name in (*pair.consumers, *pair.readers)}:
            reader = block.get_submodule(name)
            _set(reader, "weight", rotation(reader.get_parameter("weight")))
        for writer in _writers(block, self.architecture.family.residual_writers):
            _set(writer, "weight", rotation(writer.get_parameter("weight").T).T.contiguous())
            if getattr(writer, "bias", None) is not None:
                _set(writer, "bias", rotation(writer.get_parameter("bias")))


def _copy_structure(source: nn.Module) -> nn.Module:
    """Copy a block's modules alone; a tensor is let go as soon as another one takes its place."""
    shared = {id(each): each for each in (*source.parameters(), *source.buffers())}
    return copy.deepcopy(source, shared)


class _Unrotation(nn.Module):
    def __init__(self, rotation: ResidualRotation) -> None:
        super().__init__()
        self.rotation = rotation

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rotation.inverse(x)


def _fold_norm(block: nn.Module, pair: ChannelPair) -> None:
    """Move a norm's weight into the columns of everything that reads it."""
    norm = block.get_submodule(pair.producer)
    gain_K = norm.get_parameter("weight")  # noqa: N806  shape suffix
    for name in (*pair.consumers, *pair.readers):
        reader = block.get_submodule(name)
        _set(reader, "weight", reader.get_parameter("weight") * gain_K)
    _set(norm, "weight", torch.ones_like(gain_K))


def _rotate_heads(block: nn.Module, pair: ChannelPair, size: int) -> None:
    """Mix the channels of every head between producer and consumers.

    All heads take the same transform, so it does not matter how many query heads read one value
    head.
    """
    producer = block.get_submodule(pair.producer)
    for name in ("weight", "bias"):
        if getattr(producer, name, None) is not None:
            values = producer.get_parameter(name).clone()
            rows = _channel_rows(pair, len(values), values.device)
            values[rows] = rotate_rows(values[rows], size)
            _set(producer, name, values)
    for name in pair.consumers:
        consumer = block.get_submodule(name)
        _set(consumer, "weight", rotate_columns(consumer.get_parameter("weight"), size))


def _channel_rows(pair: ChannelPair, rows: int, device: torch.device) -> torch.Tensor:
    ranges = pair.rows if pair.rows is not None else ((0, rows),)
    return torch.cat([torch.arange(start, end, device=device) for start, end in ranges])


def _writers(block: nn.Module, patterns: Iterable[str]) -> Iterator[nn.Module]:
    for name, module in block.named_modules():
        if any(fnmatchcase(name, each) for each in patterns):
            yield module


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=False))

"""The learnable equivalent transformation of one block: put in place, trained, folded away.

While it is learned every twin rewrites its weight by the factors of its pairs and every norm gives
its output divided by them; folding writes both into the weights. A pair takes part when every
linear in it is quantized: a factor on a layer that stays as it was in the source would change it.
"""

from collections.abc import Mapping

import torch
from torch import nn

from engine.calibration.block import BlockShape, BlockTask
from engine.calibration.twins import Student
from engine.families.base import ChannelPair, NormKind, PairKind, QueryKeyPair, RowRanges
from engine.methods.base import ChannelStatistics
from engine.methods.compensation import RankOne, is_compensated
from engine.methods.transforms import (
    ColumnFactor,
    FactoredNorm,
    HeadFactor,
    RowFactor,
    fold_norm,
    start_factor,
)
from engine.modules.fake_quant import FakeQuantLinear
from engine.spec import FULL_BITS

__all__ = ["fold_transform", "install_compensation", "install_transform"]


def install_transform(
    student: Student, shape: BlockShape, statistics: Mapping[str, ChannelStatistics]
) -> list[nn.Parameter]:
    """Give every pair of a block its factor, at SmoothQuant's start; return what is trained.

    Args:
        student: the block with the twins in place.
        shape: the family's pairs.
        statistics: of the twins' inputs.
    """
    parameters: list[nn.Parameter] = []
    block, twins = student.block, student.twins
    # columns first: a consumer's shift passes through its rows' factors
    for pair in shape.pairs:
        if not _takes_part(pair, twins):
            continue
        shifts = _shifts(block, pair, twins)
        weights = {name: twins[name].weight for name in pair.consumers}
        factor = start_factor(pair, statistics[pair.consumers[0]], weights, shifts=shifts)
        for name in pair.consumers:
            twins[name].changes.insert(0, ColumnFactor(factor, pair))
        if pair.kind is PairKind.NORM:
            norm = block.get_submodule(pair.producer)
            block.set_submodule(pair.producer, FactoredNorm(norm, factor))
        else:
            producer = twins[pair.producer]
            producer.changes.append(RowFactor(factor, _rows(pair.rows, producer)))
        parameters.extend(factor.parameters())
    if shape.query_key is not None and _query_key_takes_part(shape.query_key, twins):
        parameters.extend(_install_query_key(student, shape.query_key).parameters())
    return parameters


def install_compensation(student: Student, task: BlockTask) -> list[nn.Parameter]:
    """Give the last linears their rank-1 change where the layer is among the first or last."""
    if not is_compensated(task.index, task.total):
        return []
    parameters: list[nn.Parameter] = []
    for name in task.shape.last_linears:
        if name in student.twins:
            twin = student.twins[name]
            change = RankOne(twin.out_features, twin.in_features, task.device)
            twin.changes.append(change)
            parameters.extend(change.parameters())
    return parameters


@torch.no_grad()
def fold_transform(student: Student, kind: NormKind) -> None:
    """Write every factor and change into norms, weights and biases."""
    for name, module in list(student.block.named_modules()):
        if isinstance(module, FactoredNorm):
            student.block.set_submodule(name, fold_norm(module, kind))
    for twin in student.twins.values():
        twin.fold()


def _takes_part(pair: ChannelPair, twins: Mapping[str, FakeQuantLinear]) -> bool:
    linears = set(pair.consumers) | ({pair.producer} if pair.kind is PairKind.LINEAR else set())
    # a router reads the channels too and stays as it is
    return linears <= set(twins) and not pair.readers


def _shifts(block: nn.Module, pair: ChannelPair, twins: Mapping[str, FakeQuantLinear]) -> bool:
    """Whether a shift helps (inputs are rounded) and every side has a bias that can take it."""
    if twins[pair.consumers[0]].a_bits == FULL_BITS:
        return False
    sides = (block.get_submodule(pair.producer), *(twins[name] for name in pair.consumers))
    moves = pair.shifts or pair.kind is PairKind.NORM
    return moves and all(getattr(each, "bias", None) is not None for each in sides)


def _rows(ranges: RowRanges | None, linear: FakeQuantLinear) -> torch.Tensor:
    spans = ranges if ranges is not None else ((0, linear.out_features),)
    parts = [torch.arange(start, stop, device=linear.weight.device) for start, stop in spans]
    return torch.cat(parts)


def _query_key_takes_part(pair: QueryKeyPair, twins: Mapping[str, FakeQuantLinear]) -> bool:
    return {pair.query, pair.key} <= set(twins)


def _install_query_key(student: Student, pair: QueryKeyPair) -> HeadFactor:
    query, key = student.twins[pair.query], student.twins[pair.key]
    device = query.weight.device
    if pair.query_norm is not None and pair.key_norm is not None:
        factor = HeadFactor(pair, device, shared=True)
        for name, power in ((pair.query_norm, -1), (pair.key_norm, 1)):
            norm = student.block.get_submodule(name)
            student.block.set_submodule(name, FactoredNorm(norm, factor, power))
        return factor
    factor = HeadFactor(pair, device, shared=False)
    repeats = pair.heads // pair.kv_heads
    query.changes.append(RowFactor(factor, _rows(pair.query_rows, query), repeats=repeats))
    key.changes.append(RowFactor(factor, _rows(pair.key_rows, key), power=1))
    return factor

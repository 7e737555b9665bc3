"""Moving factors and constants between the modules of a layer, written down once more for tests.

Works on one plain fp32 layer, by the family's table and nothing of the engine's own transforms.
"""

from dataclasses import dataclass

import torch

from engine.calibration.capture import capture_inputs
from engine.families.base import NormKind, PairKind
from engine.models.loading import SourceModel
from tests.tiny_models import save_tiny_model

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True, kw_only=True)
class TinyLayer:
    """A decoder layer of a tiny model with something to feed it."""

    source: SourceModel
    index: int = 0

    @property
    def architecture(self):
        return self.source.architecture

    def load(self):
        return self.source.load_block(self.index)

    def run(self, block):
        inputs = capture_inputs(self.source, TOKENS)
        with torch.no_grad():
            return inputs.calls[self.index].run(block, inputs.hidden)


def make_tiny_layer(folder, model_type, **fields):
    return TinyLayer(source=SourceModel.open(save_tiny_model(folder, model_type, **fields)))


def rows_of(ranges, count):
    """Indices of the rows that some ranges name; all where they are None."""
    if ranges is None:
        return torch.arange(count)
    return torch.cat([torch.arange(start, end) for start, end in ranges])


def channels_of(block, pair):
    """How many channels a pair has."""
    return len(rows_of(pair.rows, len(block.get_submodule(pair.producer).weight)))


def seen_by_consumers(pair, channel_values):
    """Repeat what belongs to a head of the producer for every head that reads it."""
    if pair.repeats == 1:
        return channel_values
    heads = channel_values.view(-1, pair.head_dim)
    return heads.repeat_interleave(pair.repeats, 0).flatten()


def divide_producer(block, pair, norm, factor, shift=None):
    """Let the producer give ``(x - shift) / factor``."""
    producer = block.get_submodule(pair.producer)
    rows = rows_of(pair.rows, len(producer.weight))
    if pair.kind is PairKind.NORM:
        assert pair.rows is None
        one = 1 if norm is NormKind.RMS_PLUS_ONE else 0
        producer.weight.data = (producer.weight.data + one) / factor - one
    else:
        producer.weight.data[rows] /= factor[:, None]
    bias = getattr(producer, "bias", None)
    if bias is not None:
        bias.data[rows] = (bias.data[rows] - (0 if shift is None else shift)) / factor


def multiply_consumers(block, pair, factor, shift=None):
    """Let every consumer give for ``(x - shift) / factor`` what it gave for ``x``."""
    factor = seen_by_consumers(pair, factor)
    for name in (*pair.consumers, *pair.readers):
        linear = block.get_submodule(name)
        if shift is not None:
            linear.bias.data += linear.weight.data @ seen_by_consumers(pair, shift)
        linear.weight.data *= factor


def move_query_key(block, pair, norm, factor):
    """Divide queries by a factor ``[kv_heads, head_dim]`` and multiply keys by it."""
    if pair.query_norm is not None:
        one = 1 if norm is NormKind.RMS_PLUS_ONE else 0
        query, key = block.get_submodule(pair.query_norm), block.get_submodule(pair.key_norm)
        query.weight.data = (query.weight.data + one) / factor[0] - one
        key.weight.data = (key.weight.data + one) * factor[0] - one
        return
    repeated = factor.repeat_interleave(pair.heads // pair.kv_heads, 0)
    for name, ranges, scale in (
        (pair.query, pair.query_rows, 1 / repeated.flatten()),
        (pair.key, pair.key_rows, factor.flatten()),
    ):
        linear = block.get_submodule(name)
        rows = rows_of(ranges, len(linear.weight))
        linear.weight.data[rows] *= scale[:, None]
        if linear.bias is not None:
            linear.bias.data[rows] *= scale


def draw_query_key_factor(pair):
    """Random factors that rotary positions let pass: equal for the channels that turn together."""
    heads = 1 if pair.query_norm is not None else pair.kv_heads
    factor = draw_factor(heads * pair.head_dim).view(heads, pair.head_dim)
    half = pair.rotary_dim // 2
    factor[:, half : 2 * half] = factor[:, :half]
    return factor


def draw_factor(count, *, signs=False):
    generator = torch.Generator().manual_seed(count)
    factor = torch.empty(count).uniform_(0.5, 2, generator=generator)
    if signs:
        factor[torch.rand(count, generator=generator) < 0.5] *= -1
    return factor


def draw_shift(count):
    return torch.randn(count, generator=torch.Generator().manual_seed(count + 1))

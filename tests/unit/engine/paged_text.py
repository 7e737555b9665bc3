"""Sequences over the pages of a decoder, as a runner has them, and rotated checkpoints."""

from dataclasses import dataclass, field

import torch

from engine.architecture import check_config
from engine.checkpoint.reader import LoadedModel
from engine.inference.decoder import TokenBatch
from engine.models.blocks import ResidentModel
from engine.models.loading import load_full_precision, read_config
from engine.models.rotated import install_rotation, rotated
from engine.modules.attention import round_queries
from engine.modules.fake_quant import FakeQuantLinear
from engine.modules.linear import QuantLinear
from engine.modules.swap import prepare_model, swap_linears
from engine.rotation import name_in_layer, online_blocks

PAGE = 16
TOKENS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1))
CHUNKS = (13, 9, 1, 1, 16)
"""A prompt in parts, with single tokens between them."""


@dataclass(kw_only=True)
class Sequence:
    """One sequence and where it is."""

    ids: torch.Tensor
    pages: tuple[int, ...]
    start: int = 0
    logits: list = field(default_factory=list)

    def positions(self, count):
        return torch.arange(self.start, self.start + count)

    def slots(self, count):
        at = self.positions(count)
        return torch.tensor(self.pages)[at // PAGE] * PAGE + at % PAGE


def batch_of(steps, *, device="cpu", logit_rows=None):
    """Make a batch of `(sequence, tokens)`, those with one token first."""
    decodes = sum(count == 1 for _, count in steps)
    assert all(count == 1 for _, count in steps[:decodes])
    widest = max(len(each.pages) for each, _ in steps)
    tables = [[*each.pages, *[0] * (widest - len(each.pages))] for each, _ in steps]
    counts = [count for _, count in steps[decodes:]]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return TokenBatch(
        token_ids=torch.cat([each.ids[each.positions(count)] for each, count in steps]).to(device),
        positions=torch.cat([each.positions(count) for each, count in steps]).to(device),
        kv_slots=torch.cat([each.slots(count) for each, count in steps]).to(device),
        block_table=torch.tensor(tables, dtype=torch.int32, device=device),
        lengths=torch.tensor(
            [each.start + count for each, count in steps], dtype=torch.int32, device=device
        ),
        decodes=decodes,
        cu_seqlens=starts.to(device) if counts else None,
        logit_rows=logit_rows,
    )


def advance(decoder, pages, steps):
    """Run one step and keep the logits of every sequence."""
    logits = decoder.forward(batch_of(steps, device=decoder.device), pages)
    for (sequence, count), own in zip(
        steps, logits.split([count for _, count in steps]), strict=True
    ):
        sequence.logits.append(own)
        sequence.start += count


def logits_in_chunks(decoder, *, kv_bits, ids=TOKENS, chunks=CHUNKS):
    """Logits ``[tokens, V]`` of a sequence that enters in parts, over scattered pages."""
    pages = decoder.new_pages(12, kv_bits=kv_bits)
    sequence = Sequence(ids=ids, pages=(5, 2, 9))
    for count in chunks:
        advance(decoder, pages, [(sequence, count)])
    return torch.cat(sequence.logits)


def load_rotated(source, spec, rotation, device="cpu", dtype=torch.float32):
    """Quantize a source as calibration stores it: rotated, inputs of down projections online.

    `dtype` is that of parameters and biases; tables of a model stay float32, as a reader has them.
    """
    architecture = check_config(read_config(source))
    blocks = online_blocks(architecture, rotation)
    names = {each.name for each in architecture.linears}
    model = load_full_precision(source)
    resident = ResidentModel(architecture=architecture, skeleton=load_full_precision(source))
    view = rotated(resident, rotation)
    for index in range(architecture.layers):
        block = model.get_submodule(architecture.layer_name(index))
        block.load_state_dict(view.load_block(index).state_dict(), assign=True)
    install_rotation(model, architecture, rotation)

    def quantized(name, linear):
        if name not in names:
            return None
        block = blocks.get(name_in_layer(architecture, name), 0)
        twin = FakeQuantLinear(linear, spec.weight_grid(name), spec.activation_bits(name), block)
        return twin.to_quant_linear()

    with torch.no_grad():
        swap_linears(model, quantized)
    for each in model.modules():
        if isinstance(each, QuantLinear) and each.bias is not None:
            each.bias = each.bias.to(dtype)
    for each in model.parameters():
        each.data = each.data.to(dtype)
    model.to(device)
    prepare_model(model)
    for index in range(architecture.layers):
        round_queries(model.get_submodule(architecture.layer_name(index)), spec.q_bits)
    return LoadedModel(model=model, spec=spec, architecture=architecture, rotation=rotation)

"""Embedding and head of a loaded checkpoint, with its rotation folded into them where that can be.

    embedding   rows e R                            once, in place of every lookup
    head        W diag(g) R behind a plain norm     for W (g n(x R^T)), as ``rms(x R) = rms(x)``

A head that is the embedding keeps both as they are, and the ends rotate at run time; a rounded one
has codes of its own, so the embedding is free again.

Shape legend: V vocabulary, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from engine.checkpoint.reader import LoadedModel
from engine.families.base import Family
from engine.families.decoding import Positions
from engine.inference.decoder.building import norm_of, projection_of
from engine.inference.decoder.device import Device
from engine.inference.decoder.ends import Entry, Exit, Learned
from engine.inference.decoder.head import CHUNK_ROWS, quantize_head
from engine.inference.decoder.projection import Projection
from engine.inference.decoder.stored import FloatLinear
from engine.models.parts import SoftCap, has_module
from engine.modules.rotated import RotatedEmbedding, UnrotatedNorm
from kernels.layer_math import Norm, NormKind

__all__ = ["Ends", "build_ends"]

RowChange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Both ends of a decoder."""

    entry: Entry
    exit_: Exit


def build_ends(loaded: LoadedModel, device: Device, head_bits: int | None) -> Ends:
    """Build both ends; weights of the model may be written to.

    Raises:
        ValueError: if `head_bits` is none that is known.
    """
    shares_weight = loaded.architecture.tied and head_bits is None
    # the head first: the embedding may be rotated in place, and the head may be made of it
    exit_ = _build_exit(loaded, device, head_bits, shares_weight=shares_weight)
    return Ends(entry=_build_entry(loaded, device, shares_weight=shares_weight), exit_=exit_)


def _build_entry(loaded: LoadedModel, device: Device, *, shares_weight: bool) -> Entry:
    family = loaded.architecture.family
    embedding = loaded.model.get_submodule(family.embedding)
    weight = embedding.get_parameter("weight").detach()
    rotation = embedding.rotation if isinstance(embedding, RotatedEmbedding) else None
    if rotation is not None and not shares_weight:
        _change_rows(weight, rotation)
        rotation = None
    scale = None
    if family.scales_embedding:
        scale = torch.as_tensor(embedding.embed_scale).to(weight)
    return Entry(
        weight=weight,
        scale=scale,
        rotation=rotation,
        project=_projection(loaded, device, family.beside_embedding),
        learned=_learned(loaded, family),
    )


def _learned(loaded: LoadedModel, family: Family) -> Learned | None:
    plan = loaded.architecture.plan
    if plan.positions is not Positions.LEARNED:
        return None
    table = loaded.model.get_submodule(family.beside_embedding[0])
    return Learned(weight=table.get_parameter("weight").detach(), offset=plan.position_offset)


def _projection(loaded: LoadedModel, device: Device, names: tuple[str, ...]) -> Projection | None:
    """The one linear among modules at an end, where the model has it."""
    present = [loaded.model.get_submodule(name) for name in names if has_module(loaded.model, name)]
    linears = [each for each in present if isinstance(each, nn.Linear)]
    return projection_of(device, linears) if linears else None


def _build_exit(
    loaded: LoadedModel, device: Device, head_bits: int | None, *, shares_weight: bool
) -> Exit:
    family = loaded.architecture.family
    module = None
    if has_module(loaded.model, family.final_norm):
        module = loaded.model.get_submodule(family.final_norm)
    norm, change = _final_norm(module, family, shares_weight=shares_weight)
    weight = loaded.model.get_parameter(loaded.architecture.head_name).detach()
    project = _projection(loaded, device, family.before_head)
    if head_bits is not None:
        power = weight.new_ones(weight.shape[1], dtype=torch.float32)
        if isinstance(norm, Norm) and norm.kind is NormKind.RMS and project is None:
            power = norm.weight.float().square()
        head = device.matrix(quantize_head(weight, head_bits, power, change), torch.float32)
    else:
        if change is not None:
            _change_rows(weight, change)
        head = device.matrix(FloatLinear(weight=weight, bias=None))
    cap = getattr(loaded.model.config, "final_logit_softcapping", None)
    return Exit(
        norm=norm,
        head=Projection(parts=(head,)),
        project=project,
        cap=None if cap is None else SoftCap(float(cap)),
        shares_weight=shares_weight,
    )


def _final_norm(
    module: nn.Module | None, family: Family, *, shares_weight: bool
) -> tuple[Norm | UnrotatedNorm | None, RowChange | None]:
    """The norm before the head, and what its rotation makes of the head's rows."""
    if module is None:
        return None, None
    if not isinstance(module, UnrotatedNorm):
        return norm_of(module, NormKind(family.norm)), None
    if shares_weight:
        return module, None
    gain, rotation = module.weight.detach().float(), module.rotation

    def fold(rows: torch.Tensor) -> torch.Tensor:
        return rotation(rows.float() * gain)  # type: ignore[no-any-return]  # a module's call

    plain = torch.ones_like(module.weight)
    return Norm(kind=NormKind.RMS, weight=plain, eps=module.eps), fold


def _change_rows(weight: torch.Tensor, change: RowChange) -> None:
    """Rewrite rows in place, some at a time."""
    for rows in torch.split(weight, CHUNK_ROWS):
        rows.copy_(change(rows))

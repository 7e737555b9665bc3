"""What every decoder block is called with, found by running the model's own forward.

Its layers are replaced by recorders. Masks and rotary positions depend on family, layer and window
length, not on the tokens, so the first window tells them for all.

Shape legend: W windows, T tokens, H hidden size.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from typing_extensions import override

from engine.calibration.placement import Placement
from engine.families.base import LayerCall
from engine.models.blocks import BlockModel
from engine.models.parts import entry_names, exit_names
from engine.modules.rotated import RotatedEmbedding
from engine.spec import FULL_BITS
from kernels.activation_rounding import round_activations

__all__ = ["BlockCall", "BlockInputs", "capture_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCall:
    """How one decoder block is called."""

    arguments: dict[str, Any]
    """Keyword arguments beside the hidden states."""
    convention: LayerCall = field(default_factory=LayerCall)
    """Of the family."""

    def run(self, block: nn.Module, hidden: torch.Tensor, kv_bits: int = FULL_BITS) -> torch.Tensor:
        """Apply a block to ``[B, T, H]``; keys and values are rounded to `kv_bits`."""
        cache = None if kv_bits == FULL_BITS else RoundedKeysAndValues(kv_bits)
        out = block(hidden, **{self.convention.cache: cache}, **self.arguments)
        first: torch.Tensor = out[0] if self.convention.returns_tuple else out
        return first


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInputs:
    """The inputs of block 0 and the call of every block."""

    hidden: torch.Tensor
    """``[W, T, H]``."""
    calls: tuple[BlockCall, ...]


class RoundedKeysAndValues:
    """Stands in for a cache: gives back what a quantized cache would, and keeps nothing."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round ``[B, heads, T, head_dim]``, one scale a token and head; differentiable."""
        return (
            round_activations(keys, self._bits).to(keys.dtype),
            round_activations(values, self._bits).to(values.dtype),
        )


@torch.no_grad()
def capture_inputs(
    model: BlockModel,
    tokens: torch.Tensor,
    device: torch.device | str = "cpu",
    placement: Placement | None = None,
) -> BlockInputs:
    """Embed the windows and record how the blocks are called.

    Args:
        model: whose embedding is read.
        tokens: int64 ``[W, T]``.
        device: where masks shall be.
        placement: where hidden states shall be; None puts them on the device.
    """
    family = model.architecture.family
    blocks = cast("nn.ModuleList", model.skeleton.get_submodule(family.layers))
    recorders = [_Recorder(each, family.call) for each in blocks]
    stack = _make_stack(model, recorders, device)
    hidden = None
    for window, each in enumerate(tokens):
        heard = recorders[0].listen(stack, each[None].to(device))
        if hidden is None:
            shape = (len(tokens), *heard.shape[1:])
            make = heard.new_empty if placement is None else placement.empty
            hidden = make(shape, dtype=heard.dtype)
        hidden[window] = heard[0]
    assert hidden is not None, "there is a window"
    return BlockInputs(
        hidden=hidden,
        calls=tuple(
            BlockCall(arguments=each.arguments, convention=family.call) for each in recorders
        ),
    )


def _make_stack(
    model: BlockModel, recorders: Sequence[nn.Module], device: torch.device | str
) -> nn.Module:
    """Copy what holds the layers, with recorders as layers and nothing behind them."""
    family, skeleton = model.architecture.family, model.skeleton
    place = family.layers.rpartition(".")[0]
    embedding = skeleton.get_submodule(family.embedding)
    parts: dict[str, nn.Module] = {name: nn.Identity() for name in exit_names(skeleton, family)}
    weight = model.load_embedding()
    if isinstance(embedding, RotatedEmbedding):
        # its rows are given as they come out
        embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    parts[family.embedding] = _HostEmbedding(embedding, weight, device)
    parts[family.layers] = nn.ModuleList(recorders)
    for name in entry_names(skeleton, family):
        parts[name] = copy.deepcopy(model.load_part(name)).to(device)
    if family.has_rotary:
        rotary = f"{place}.rotary_emb"
        parts[rotary] = copy.deepcopy(skeleton.get_submodule(rotary)).to(device)
    stack = copy.copy(skeleton.get_submodule(place))
    # a shallow copy shares its table of parts; the model itself must keep its layers
    stack._modules = dict(stack._modules)  # noqa: SLF001  nn.Module has no public way
    for name, part in parts.items():
        # the head is outside the stack
        if name.startswith(f"{place}."):
            setattr(stack, name.removeprefix(f"{place}."), part)
    return stack


class _HostEmbedding(nn.Module):
    """The model's embedding with its weight in main memory, giving vectors on the device."""

    def __init__(
        self, embedding: nn.Module, weight: torch.Tensor, device: torch.device | str
    ) -> None:
        super().__init__()
        self._device = device
        self._inner = copy.copy(embedding)
        # private, as above: neither the model's weight nor its scale may move
        self._inner._parameters = {"weight": nn.Parameter(weight.cpu(), requires_grad=False)}  # noqa: SLF001
        self._inner._buffers = {  # noqa: SLF001
            name: None if each is None else each.cpu()
            for name, each in embedding._buffers.items()  # noqa: SLF001
        }

    @override
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self._inner(tokens.cpu())
        return vectors.to(self._device)


class _Recorder(nn.Module):
    """Keeps what it was called with first, and passes hidden states on."""

    def __init__(self, block: nn.Module, convention: LayerCall) -> None:
        super().__init__()
        # families with sliding windows choose the mask by this
        self.attention_type = getattr(block, "attention_type", "full_attention")
        self.arguments: dict[str, Any] = {}
        self._convention = convention
        self._heard: torch.Tensor | None = None

    def listen(self, stack: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Run the stack on int64 ``[1, T]`` and give what came to this layer: ``[1, T, H]``."""
        stack(input_ids=tokens, use_cache=False)
        assert self._heard is not None, "the stack calls every layer"
        return self._heard

    @override
    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        dropped = (self._convention.cache, "use_cache")
        self._heard = hidden_states
        self.arguments = self.arguments or {
            name: each for name, each in arguments.items() if name not in dropped
        }
        return (hidden_states, None) if self._convention.returns_tuple else hidden_states

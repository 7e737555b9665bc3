"""What every decoder block is called with, found by running the model's own forward once.

Masks and rotary positions depend on family, layer and window length, not on the tokens, so one
window tells them for all.

Shape legend: W windows, T tokens, H hidden size.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from typing_extensions import override

from engine.models.blocks import BlockModel
from engine.numerics.affine import fake_quantize_activations
from engine.spec import FULL_BITS

__all__ = ["BlockCall", "BlockInputs", "capture_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCall:
    """How one decoder block is called."""

    arguments: dict[str, Any]
    """Keyword arguments beside the hidden states."""

    def run(self, block: nn.Module, hidden: torch.Tensor, kv_bits: int = FULL_BITS) -> torch.Tensor:
        """Apply a block to ``[B, T, H]``; keys and values are rounded to `kv_bits`."""
        cache = None if kv_bits == FULL_BITS else RoundedKeysAndValues(kv_bits)
        out: torch.Tensor = block(hidden, past_key_values=cache, **self.arguments)
        return out


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
            fake_quantize_activations(keys, self._bits).to(keys.dtype),
            fake_quantize_activations(values, self._bits).to(values.dtype),
        )


@torch.no_grad()
def capture_inputs(
    model: BlockModel, tokens: torch.Tensor, device: torch.device | str = "cpu"
) -> BlockInputs:
    """Embed the windows and record how the blocks are called.

    Args:
        model: whose embedding is read.
        tokens: int64 ``[W, T]``.
        device: where hidden states and masks shall be.
    """
    hidden = nn.functional.embedding(tokens, model.load_embedding().cpu()).to(device)
    stack = copy.copy(model.skeleton.get_submodule("model"))
    # a shallow copy shares its table of parts; the model itself must keep its layers
    stack._modules = dict(stack._modules)  # noqa: SLF001  nn.Module has no public way
    recorders = [_Recorder(each) for each in cast("nn.ModuleList", stack.layers)]
    stack.layers = nn.ModuleList(recorders)
    stack.norm = nn.Identity()
    stack.rotary_emb = copy.deepcopy(stack.get_submodule("rotary_emb")).to(device)
    stack(inputs_embeds=hidden[:1], use_cache=False)
    return BlockInputs(
        hidden=hidden, calls=tuple(BlockCall(arguments=each.arguments) for each in recorders)
    )


class _Recorder(nn.Module):
    """Keeps what it was called with and passes hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # families with sliding windows choose the mask by this
        self.attention_type = getattr(block, "attention_type", "full_attention")
        self.arguments: dict[str, Any] = {}

    @override
    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        dropped = ("past_key_values", "use_cache")
        self.arguments = {name: each for name, each in arguments.items() if name not in dropped}
        return hidden_states

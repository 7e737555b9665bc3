"""What happens inside scaled dot-product attention, whatever the family: seen and changed there.

Every family calls the same torch function with queries and keys that rotary embedding has already
turned. A torch function mode meets them there: it rounds the queries of a quantized layer to their
own bits, or keeps queries and keys so that attention maps can be compared.

Shape legend: B windows, A heads, T tokens, D dimensions of a head.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from engine.spec import FULL_BITS
from kernels.activation_rounding import round_activations

__all__ = ["AttentionProbe", "SeenAttention", "round_queries"]

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenAttention:
    """The arguments of one call."""

    query: torch.Tensor
    """``[B, A, T, D]``."""
    key: torch.Tensor
    """``[B, A, T, D]``, repeated for every query head."""
    mask: torch.Tensor
    """bool ``[..., T, T]``, true where a query may look."""
    bias: torch.Tensor | None
    """float ``[..., T, T]``, added to the scores (positions as ALiBi has them)."""
    scale: float

    def log_probabilities(self, window: int) -> torch.Tensor:
        """The maps of one window: float32 ``[A, T, T]``, very small where masked."""
        scores = self.query[window].float() @ self.key[window].float().transpose(-1, -2)
        scores = scores * self.scale
        if self.bias is not None:
            scores = scores + _of_window(self.bias, window)
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~self.mask_of(window), lowest)
        return torch.log_softmax(scores, dim=-1)

    def mask_of(self, window: int) -> torch.Tensor:
        """Where the queries of one window may look: bool ``[T, T]`` or ``[A, T, T]``."""
        return _of_window(self.mask, window)


class AttentionProbe(TorchFunctionMode):
    """Keeps queries and keys of the attention that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: SeenAttention | None = None

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Pass every call on."""
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            self.seen = _read_call({**dict(zip(ARGUMENTS, args, strict=False)), **kwargs})
        return func(*args, **kwargs)


def round_queries(layer: nn.Module, bits: int) -> None:
    """Round the queries of a decoder layer, for each token and head, whenever it is called.

    Args:
        layer: changed in place; its forward must not be entered twice at once.
        bits: 2..8, or 16 for nothing.
    """
    if bits == FULL_BITS:
        return
    modes: list[_RoundedQueries] = []

    def enter(*_: object) -> None:
        modes.append(_RoundedQueries(bits))
        modes[-1].__enter__()  # type: ignore[no-untyped-call]  # torch has no types here

    def leave(*_: object) -> None:
        modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # as above

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave, always_call=True)


class _RoundedQueries(TorchFunctionMode):
    """Gives attention the queries that their codes stand for; differentiable."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Pass every call on."""
        if func is nn.functional.scaled_dot_product_attention:
            given = {**dict(zip(ARGUMENTS, args, strict=False)), **(kwargs or {})}
            query = given.pop("query")
            rounded = round_activations(query, self._bits).to(query.dtype)
            return func(query=rounded, **given)
        return func(*args, **(kwargs or {}))


def _read_call(given: Mapping[str, Any]) -> SeenAttention:
    query, key = given["query"], given["key"]
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    shape = (query.shape[2], key.shape[2])
    mask = torch.ones(shape, dtype=torch.bool, device=query.device)
    if given.get("is_causal"):
        mask = mask.tril()
    limits, bias = given.get("attn_mask"), None
    if limits is not None and limits.dtype == torch.bool:
        mask = limits
    elif limits is not None:
        mask, bias = limits > torch.finfo(limits.dtype).min / 2, limits.float()
    scale = given.get("scale") or 1 / math.sqrt(query.shape[-1])
    return SeenAttention(query=query, key=key, mask=mask, bias=bias, scale=scale)


def _of_window(each: torch.Tensor, window: int) -> torch.Tensor:
    return each if each.dim() < 4 else each[min(window, len(each) - 1)]

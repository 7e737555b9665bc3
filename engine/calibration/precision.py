"""The arithmetic of training: bfloat16 products on a GPU, and attention whose gradients repeat.

Hidden states, norms, losses and everything that is learned stay float32; autocast rounds only the
operands of matrix products.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["repeatable_attention", "training_precision"]


def training_precision(device: torch.device) -> AbstractContextManager[object]:
    """Round the operands of products to bfloat16 on a GPU; change nothing on a CPU."""
    if device.type == "cpu":
        return nullcontext()
    # a graph must not hold casts of an earlier step
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@contextmanager
def repeatable_attention(device: torch.device) -> Iterator[None]:
    """Choose an attention whose gradients are the same bits every time."""
    if device.type == "cpu":
        yield
        return
    allowed: bool = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]  # torch has no types here
    # else the plain attention would compute in float32, away from the tensor cores
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # noqa: FBT003  torch's own
    try:
        # the fused kernels of a GPU add up their gradients in no fixed order
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)

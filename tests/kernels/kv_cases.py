"""Filled key-value caches, and the modules of `kernels` as the machine at hand can run them."""

import importlib
import sys

import torch

import kernels
from kernels.kv_append import HeadStates, append_kv_reference
from kernels.kv_pages import KvPages

INNER = ("kv_tiles", "attention_chunks", "_kv_append_kernel")
"""What the modules share, or keep their kernels in."""


def fresh_module(name, *, interpreted, monkeypatch, inner=INNER):
    """Import a module of `kernels` anew; `triton.jit` decides at import whether it interprets."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    for stale in (name, *inner):
        if f"kernels.{stale}" in sys.modules:
            # remembered, so that the module of before comes back, by both of its names
            monkeypatch.setitem(sys.modules, f"kernels.{stale}", None)
            del sys.modules[f"kernels.{stale}"]
        if hasattr(kernels, stale):
            monkeypatch.delattr(kernels, stale)
    return importlib.import_module(f"kernels.{name}")


def filled_pages(lengths, kv_heads, head_dim, *, bits, page_size=16, dtype, device="cpu", fill=1.0):
    """Pages of random tokens, scattered, with garbage in every slot that belongs to no token.

    Returns:
        The pages, the block table int32 ``[B, max_pages]`` and the lengths int32 ``[B]``.
    """
    per_sequence = [-(-length // page_size) for length in lengths]
    total, widest = sum(per_sequence), max(*per_sequence, 1)
    pages = KvPages.allocate(
        total + 2, kv_heads, head_dim, bits=bits, page_size=page_size, dtype=dtype, device=device
    )
    pages.codes.fill_(float("nan") if bits == 16 else 255)
    pages.scale.fill_(float("nan"))
    order = torch.randperm(total + 2)[:total].tolist()
    table = torch.full((len(lengths), widest), -1, dtype=torch.int32)
    slots = []
    for b, (length, count) in enumerate(zip(lengths, per_sequence, strict=True)):
        table[b, :count] = torch.tensor(order[:count], dtype=torch.int32)
        order = order[count:]
        t = torch.arange(length)
        slots.append(table[b, t // page_size].long() * page_size + t % page_size)
    slots = torch.cat(slots).to(device)
    key = torch.randn(slots.numel(), kv_heads, head_dim, device=device).mul_(fill)
    value = (
        torch.randn_like(key) * torch.logspace(-2, 1, slots.numel(), device=device)[:, None, None]
    )
    states = HeadStates(query=None, key=key.to(dtype), value=value.to(dtype))
    append_kv_reference(pages, states, slots)
    return pages, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)

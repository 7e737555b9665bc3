"""Operands of products on sliced weights, and private copies of the modules that compute them."""

import importlib.util
import sys
from pathlib import Path

import torch

from kernels.layouts import pack_codes
from kernels.sliced import slice_weight
from kernels.tokens import TokenCodes
from tests.kernels.integer_cases import random_tokens

KERNELS = Path(__file__).parents[2] / "kernels"


def load_kernel_modules(names, *, interpreted, monkeypatch):
    """Import private copies that call each other; `triton.jit` decides at import what it makes."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    for name in names:
        qualified = f"kernels.{name}"
        spec = importlib.util.spec_from_file_location(qualified, KERNELS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, qualified, module)
        spec.loader.exec_module(module)
    return sys.modules[f"kernels.{names[-1]}"]


def sliced_weight(codes, bits, *, groups=1, half_step=False, device="cpu", **layout):
    """A weight of these codes and, with them, what its fields hold: 128 lower at 8 bits."""
    n, k = codes.shape
    weight = slice_weight(
        pack_codes(codes, bits).to(device),
        torch.rand(n, groups).add(0.1).half().to(device),
        torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8).to(device),
        k,
        half_step=half_step,
        **layout,
    )
    return weight, (codes.int() - (128 if bits == 8 else 0)).to(device)


def random_codes(n, k, bits, fill=None):
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    return codes if fill is None else codes.fill_(fill)


def token_codes(m, weight, bits, *, fill=None, device="cpu"):
    tokens = random_tokens(m, weight.in_features, bits, device, fill)
    return TokenCodes.from_activations(tokens, groups=weight.groups, columns=weight.columns)

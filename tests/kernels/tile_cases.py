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


def product_of_codes(tokens, codes, weight, bias=None):
    """Zero-points first, products in float64 below 2^53, scales in float32, groups in order."""
    n, k = codes.shape
    groups = weight.scale.shape[1]
    u_x = tokens.codes[:, :k].long() - tokens.zero_point[:, None]
    u_w = codes.long().view(n, groups, k // groups) * weight.multiplier
    u_w = u_w - weight.zero_point[:n, :, None]
    out = torch.zeros(len(u_x), n, device=u_x.device)
    for g, part in enumerate(torch.split(u_x, k // groups, dim=1)):
        # exact: float64 holds every integer below 2^53, and the layout holds sums below 2^31
        whole = part.double() @ u_w[:, g].double().t()
        out += whole.float() * weight.scale[:n, g].float()
    out *= tokens.scale[:, None]
    return out if bias is None else out + bias.float()

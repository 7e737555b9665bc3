"""Quantized operands for tests, and their product computed in int64."""

import torch

from kernels.activation_quant import QuantizedActivations
from kernels.int_linear import PackedWeight
from kernels.layouts import pack_codes, unpack_codes


def random_tokens(m, k, bits, device="cpu", fill=None):
    codes = torch.randint(0, 1 << bits, (m, k), dtype=torch.uint8)
    if fill is not None:
        codes.fill_(fill)
    return QuantizedActivations(
        codes=codes.to(device),
        scale=torch.rand(m, 1).add(0.1).to(device),
        zero_point=torch.randint(0, 1 << bits, (m, 1), dtype=torch.int32).to(device),
        bits=bits,
    )


def random_weight(n, k, max_code, groups=1, device="cpu", fill=None):
    codes = torch.randint(0, max_code + 1, (n, k), dtype=torch.uint8)
    if fill is not None:
        codes.fill_(fill)
    return weight_of(codes, max_code, groups, device)


def weight_of(codes, max_code, groups=1, device="cpu"):
    n, k = codes.shape
    return PackedWeight.from_stored(
        pack_codes(codes, max_code.bit_length()).to(device),
        torch.rand(n, groups).add(0.1).half().to(device),
        torch.randint(0, max_code + 1, (n, groups), dtype=torch.uint8).to(device),
        k,
    )


def product_in_int64(tokens, weight, bias=None):
    """Subtract zero-points first, multiply in int64, scale per group in float32."""
    k, groups = weight.in_features, weight.scale.shape[1]
    u = tokens.codes.long().cpu() - tokens.zero_point.cpu()
    w = unpack_codes(weight.packed.cpu(), k).long().view(-1, groups, k // groups)
    w = w - weight.zero_point.cpu().long().unsqueeze(-1)
    out = torch.zeros(u.shape[0], w.shape[0])
    for g, part in enumerate(u.split(k // groups, dim=1)):
        out += (part @ w[:, g].t()).float() * weight.scale.cpu()[:, g].float()
    out = out * tokens.scale.cpu()
    return out if bias is None else out + bias.cpu().float()

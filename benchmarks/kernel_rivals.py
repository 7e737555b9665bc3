"""What else multiplies such operands, each through its own package and with operands of its own.

Every rival is timed as our kernels are: captured, weights rotating, quantized tokens given. A
package that is not installed, or a product that it does not offer, has no time.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernel_case import HALF_BITS, KernelCase
from benchmarks.timing import Check, Launch, Method, copies_to_rotate

__all__ = ["RIVALS", "Prepared", "Rival", "cache_key"]

TOLERANCE = 0.02
"""Of the norm: rivals round where they like, but compute the product."""
GEMLITE_GROUP = 128
INT_MM_LEAST_TOKENS = 17
"""cuBLASLt has no int8 product of fewer on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A product ready to be timed."""

    launch: Launch
    copies: int
    check: Check


Rival = Callable[[KernelCase, torch.device, Method], Prepared | None]


def cache_key(name: str, case: KernelCase) -> tuple[Any, ...]:
    """Cases with equal keys are one product to a rival."""
    shape = (name, case.n, case.k, case.m)
    return (*shape, case.w_bits, case.a_bits) if name in {"humming", "gemlite"} else shape


def _prepare_cublas(case: KernelCase, device: torch.device, method: Method) -> Prepared:
    copies = copies_to_rotate(case.n * case.k * 2, method)
    w = torch.randn(copies, case.n, case.k, device=device, dtype=torch.bfloat16)
    x = torch.randn(case.m, case.k, device=device, dtype=torch.bfloat16)
    # copies differ, so the check holds each to its own size only
    return Prepared(
        launch=lambda index: torch.mm(x, w[index].t()), copies=copies, check=_looks_random
    )


def _prepare_int_mm(case: KernelCase, device: torch.device, method: Method) -> Prepared | None:
    if case.n % 8 or case.k % 8 or (device.type == "cuda" and case.m < INT_MM_LEAST_TOKENS):
        return None
    copies = copies_to_rotate(case.n * case.k, method)
    one = torch.randint(-128, 128, (case.n, case.k), device=device, dtype=torch.int8)
    w = one.expand(copies, -1, -1).contiguous()
    x = torch.randint(-128, 128, (case.m, case.k), device=device, dtype=torch.int8)
    expected = (x.double() @ one.double().t()).to(torch.int32)
    return Prepared(
        launch=lambda index: torch._int_mm(x, w[index].t()),  # noqa: SLF001  its only name
        copies=copies,
        check=lambda output: bool(torch.equal(output, expected)),
    )


def _prepare_humming(case: KernelCase, device: torch.device, method: Method) -> Prepared | None:
    """Int8 tokens with a scale each, symmetric weights, one scale a row or group."""
    if not _is_usable("humming", device) or case.a_bits == HALF_BITS:
        return None
    from humming.forward import humming_forward  # noqa: PLC0415  an optional rival
    from humming.layer import HummingLayer  # noqa: PLC0415  an optional rival
    from humming.tune import get_heuristics_config  # noqa: PLC0415  an optional rival

    group = max(0, case.group_size)
    layer = HummingLayer(
        shape_n=case.n, shape_k=case.k, torch_dtype=torch.bfloat16,
        weight_config={"dtype": f"int{case.w_bits}", "group_size": group},
        input_config={"dtype": "int8"},
    ).to(device)  # fmt: skip
    schema = layer.weight_schema
    original = torch.randn(case.n, case.k, device=device, dtype=torch.bfloat16)
    tensors = schema.quant_tensor(original, schema, torch.bfloat16)
    w_NK = schema.dequant_tensors(tensors).float()
    layer.load_from_tensors(tensors)
    layer.transform()
    codes = torch.randint(-127, 128, (case.m, case.k), device=device, dtype=torch.int8)
    # rows of scales are read four at a time
    scale = torch.full((-(-case.m // 4) * 4,), 2.0**-7, device=device)[: case.m].view(-1, 1)
    expected = codes.float() @ w_NK.t() * scale
    tuning = dict(get_heuristics_config(layer.humming_config, shape_m=case.m, device=device))
    names = ("weight", "weight_scale", "zero_point")
    stored = {
        name: getattr(layer, name) for name in names if getattr(layer, name, None) is not None
    }
    copies = copies_to_rotate(sum(each.nbytes for each in stored.values()), method)
    rotating = [
        {name: each.detach().clone() for name, each in stored.items()} for _ in range(copies)
    ]
    locks = torch.zeros(2048, dtype=torch.int32, device=device)

    def launch(index: int) -> torch.Tensor:
        output: torch.Tensor = humming_forward(
            layer.humming_config, inputs=codes, input_scale=scale, locks=locks,
            tuning_config=tuning, **rotating[index],
        )  # fmt: skip
        return output

    return Prepared(launch=launch, copies=copies, check=_close_to(expected))


def _prepare_gemlite(case: KernelCase, device: torch.device, method: Method) -> Prepared | None:
    """Its weight-only product, fp16 tokens and groups of 128, where it has the width."""
    known = case.w_bits in {1, 2, 4, 8} and case.k % GEMLITE_GROUP == 0
    if not _is_usable("gemlite", device) or not known:
        return None
    from gemlite.core import forward_functional  # noqa: PLC0415  an optional rival
    from gemlite.helper import A16Wn  # noqa: PLC0415  an optional rival

    codes = torch.randint(0, 1 << case.w_bits, (case.n, case.k), device=device).to(torch.uint8)
    shape = (case.n, case.k // GEMLITE_GROUP)
    scale = torch.rand(shape, device=device).add_(0.5).mul_(2.0**-7).half()
    zero = torch.randint(0, 1 << case.w_bits, shape, device=device).half()
    layer = A16Wn(device=str(device), dtype=torch.float16).from_weights(
        codes.view(case.n, case.k), scale.view(-1, 1), zero.view(-1, 1), case.w_bits, GEMLITE_GROUP
    )
    grouped = codes.float().view(*shape, GEMLITE_GROUP)
    w_NK = ((grouped - zero.float()[..., None]) * scale.float()[..., None]).view(case.n, case.k)
    x = torch.randn(case.m, case.k, device=device, dtype=torch.float16)
    stored = layer.get_tensor_args()
    copies = copies_to_rotate(sum(each.nbytes for each in stored), method)
    rotating = [[each.detach().clone() for each in stored] for _ in range(copies)]
    meta = layer.get_meta_args()

    def launch(index: int) -> torch.Tensor:
        output: torch.Tensor = forward_functional(x, None, rotating[index], meta)
        return output

    return Prepared(launch=launch, copies=copies, check=_close_to(x.float() @ w_NK.t()))


RIVALS: Mapping[str, Rival] = {
    "cublas_bf16": _prepare_cublas,
    "int_mm": _prepare_int_mm,
    "humming": _prepare_humming,
    "gemlite": _prepare_gemlite,
}


def _is_usable(package: str, device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec(package) is not None


def _close_to(expected: torch.Tensor) -> Check:
    size = expected.norm()
    return lambda output: bool((output.float() - expected).norm() < TOLERANCE * size)


def _looks_random(output: torch.Tensor) -> bool:
    return bool(output.isfinite().all()) and bool(output.float().std() > 0)

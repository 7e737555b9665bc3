"""Our products, ready to be timed: rotating weights, a plan to launch them, a check to hold to."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.kernel_case import KernelCase
from benchmarks.kernel_operands import (
    Operands,
    copy_tensors,
    draw_operands,
    make_check,
    tensor_bytes,
)
from benchmarks.kernel_rivals import RIVALS, Prepared
from benchmarks.timing import Check, Method, copies_to_rotate
from benchmarks.token_products import TokenCase, prepare_tokens
from benchmarks.warming import describe, launch_each
from kernels.binary_linear import ProductShape, select_config
from kernels.fragments import ColumnOrder, FragmentTokens, FragmentWeight
from kernels.linear import (
    Plan,
    column_order,
    launch_binary,
    launch_half,
    launch_plan,
    make_counters,
    plan_linear,
    weight_only_linear,
)
from kernels.sliced import SlicedWeight
from kernels.sliced_reference import sliced_linear_reference
from kernels.tables import Route, load_table
from kernels.token_fragments import pack_token_fragments
from kernels.tokens import TokenCodes

__all__ = [
    "OURS", "PlanTask", "Product", "Rotation", "compile_launch", "compile_plans", "out_dtype",
    "plan_product", "prepare_product", "release_memory", "rotate_operands",
]  # fmt: skip

OURS = "ours"
ONCE = Method(rotate_bytes=0)
"""For compiling: the fewest copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product(Prepared):
    """A product of ours."""

    op: str
    """The kernel that answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Operands with copies of the weight, and what every plan must compute from them."""

    operands: Operands
    weights: Sequence[SlicedWeight]
    check: Check


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTask:
    """Plans of one case, for another process to compile."""

    case: KernelCase
    plans: Sequence[Plan]


def prepare_product(case: KernelCase, device: torch.device, method: Method) -> Product:
    """Draw operands, and launch them as the table of the GPU says, or as a CPU answers."""
    rotation = rotate_operands(draw_operands(case, device), method)
    if device.type == "cuda":
        table = load_table(torch.cuda.get_device_name(device))
        plan = plan_linear(case.key, table, with_fragments=True)
        return plan_product(rotation, plan)
    return Product(
        op="reference",
        copies=len(rotation.weights),
        launch=lambda index: _answer_on_cpu(rotation.operands, rotation.weights[index]),
        check=rotation.check,
    )


def rotate_operands(operands: Operands, method: Method) -> Rotation:
    """Copy the weight until no cache holds all copies."""
    copies = copies_to_rotate(tensor_bytes(operands.weight), method)
    bounds: list[Check] = []

    def check(output: torch.Tensor) -> bool:
        # whoever only compiles never computes the right answer
        if not bounds:
            bounds.append(make_check(operands, out_dtype(operands.planes.device)))
        return bounds[0](output)

    return Rotation(
        operands=operands,
        weights=[operands.weight, *(copy_tensors(operands.weight) for _ in range(copies - 1))],
        check=check,
    )


def plan_product(rotation: Rotation, plan: Plan) -> Product:
    """Launch operands as a plan says, on a GPU or in the interpreter."""
    tokens, x = rotation.operands.tokens, rotation.operands.x
    if x is not None:
        return _half_product(rotation, plan, x)
    assert tokens is not None, "tokens are codes or 16-bit values"
    device, weights = tokens.codes.device, rotation.weights
    if plan.route is Route.BINARY or rotation.operands.case.cut:
        return _binary_product(rotation, plan)
    counters, dtype = make_counters(device), out_dtype(device)
    return Product(
        op=f"{plan.route}_linear",
        copies=len(weights),
        launch=lambda index: launch_plan(
            plan, tokens, weights[index], out_dtype=dtype, counters=counters
        ),
        check=rotation.check,
    )


def _half_product(rotation: Rotation, plan: Plan, x: torch.Tensor) -> Product:
    return Product(
        op=plan.route if plan.route is Route.HALF_DECODE else f"{plan.route}_linear",
        copies=len(rotation.weights),
        launch=lambda index: launch_half(plan, x, rotation.weights[index]),
        check=rotation.check,
    )


def _binary_product(rotation: Rotation, plan: Plan) -> Product:
    """Time the cutting of tokens into bits too, unless the case says that they come so."""
    operands = rotation.operands
    case = operands.case
    assert isinstance(operands.tokens, TokenCodes), "16-bit tokens have no bits to multiply"
    weight = FragmentWeight.from_stored(
        operands.planes, operands.scale, operands.zero_point, case.k
    )
    weights = [weight, *(copy_tensors(weight) for _ in rotation.weights[1:])]
    if plan.route is not Route.BINARY:
        plan = binary_plan(case)
    tokens: TokenCodes | FragmentTokens = operands.tokens
    if case.cut:
        tokens = pack_token_fragments(operands.tokens, column_order(plan.config))
    return Product(
        op="binary_linear_cut" if case.cut else "binary_linear",
        copies=len(weights),
        launch=lambda index: launch_binary(plan, tokens, weights[index]),
        check=rotation.check,
    )


def binary_plan(case: KernelCase) -> Plan:
    """The binary kernel's own choice for many tokens."""
    shape = ProductShape(
        order=ColumnOrder.TOKENS, m=case.m, n=case.n, k=case.k,
        weight_bits=case.w_bits, token_bits=case.a_bits,
    )  # fmt: skip
    return Plan(route=Route.BINARY, config=select_config(shape))


def release_memory(device: torch.device) -> None:
    """Give back what earlier products have held, before other processes need it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def compile_launch(task: tuple[str, KernelCase | TokenCase]) -> str | None:
    """Launch ours or a rival once, in a process of its own; returns what went wrong."""
    name, case = task
    device = torch.device("cuda")
    try:
        prepared: Prepared | None
        if isinstance(case, TokenCase):
            prepared = prepare_tokens(case, device)
        else:
            prepare = prepare_product if name == OURS else RIVALS[name]
            prepared = prepare(case, device, ONCE)
        if prepared is not None:
            prepared.launch(0)
            torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001  whatever it is, the parent hears of it
        return describe(error)
    return None


def compile_plans(task: PlanTask) -> list[str | None]:
    """Launch a case by several plans; what went wrong with each, None where nothing did."""
    device = torch.device("cuda")
    rotation = rotate_operands(draw_operands(task.case, device), ONCE)
    return launch_each(task.plans, lambda plan: plan_product(rotation, plan).launch(0))


def out_dtype(device: torch.device) -> torch.dtype:
    """As models have it on a GPU; Triton's interpreter cuts bfloat16 where a GPU rounds."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _answer_on_cpu(operands: Operands, weight: SlicedWeight) -> torch.Tensor:
    if operands.tokens is not None:
        return sliced_linear_reference(operands.tokens, weight, out_dtype=torch.float32)
    assert operands.x is not None
    return weight_only_linear(operands.x.float(), weight)

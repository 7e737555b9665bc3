from dataclasses import replace

import pytest
import torch

from kernels import binary_linear as module
from kernels.activation_quant import quantize_activations
from kernels.binary_linear import (
    LaunchConfig,
    ProductShape,
    binary_configs,
    binary_linear,
    binary_linear_reference,
    select_config,
)
from kernels.fragments import ColumnOrder, FragmentTokens, FragmentWeight, columns_a_token
from kernels.layouts import pack_codes
from kernels.tokens import TokenCodes
from tests.kernels.gluon_emulator import EmulatedKernel
from tests.kernels.machine_code import compile_kernel

GPU = torch.cuda.is_available()
BITS, TOKENS = ColumnOrder.BITS, ColumnOrder.TOKENS
KERNELS = {
    "bmma_decode_kernel": "_binary_linear_kernel.py",
    "bmma_prefill_kernel": "_binary_prefill_kernel.py",
}
SMALL = LaunchConfig(row_tiles=4, column_tiles=2, warps_n=2, warps_other=1, steps=1, stages=2)


@pytest.fixture(params=["as they land"] if GPU else ["late", "early"])
def copies(request, monkeypatch):
    """Run the Gluon kernels: on the GPU, else on NumPy with copies that land late or early."""
    if GPU:
        return
    for name, file in KERNELS.items():
        kernel = EmulatedKernel(name, early=request.param == "early", file=file)
        monkeypatch.setattr(module, name, kernel)


@pytest.fixture
def kernels(monkeypatch):
    """The same where no copies are."""
    if not GPU:
        name = "bmma_decode_kernel"
        monkeypatch.setattr(module, name, EmulatedKernel(name))


class Case:
    """Random operands and their product in int64, zero-points subtracted first."""

    def __init__(self, m, n, k, w_bits, a_bits, *, groups=1, multiplier=1):
        device = "cuda" if GPU else "cpu"
        codes = torch.randint(0, 1 << w_bits, (n, k), dtype=torch.uint8)
        self.activations = quantize_activations(torch.randn(m, k) + 0.5, a_bits)
        self.scale = torch.rand(n, groups).add(0.1).half()
        zero_point = torch.randint(-9, (1 << w_bits) + 9, (n, groups))
        self.bias = torch.randn(n, device=device)
        self.centred = multiplier * codes.long().view(n, groups, -1) - zero_point.unsqueeze(-1)
        packed = pack_codes(codes, w_bits).to(device)
        self.weight = FragmentWeight.from_stored(
            packed, self.scale.to(device), zero_point.to(device), k, multiplier
        )
        on_device = replace(
            self.activations,
            codes=self.activations.codes.to(device),
            scale=self.activations.scale.to(device),
            zero_point=self.activations.zero_point.to(device),
        )
        self.tokens = TokenCodes.from_activations(on_device, groups=groups)

    def run(self, order, config=None, dtype=torch.float32):
        tokens = FragmentTokens.from_tokens(self.tokens, order)
        shape = (self.activations.codes.shape[0], self.weight.out_features)
        out = torch.full(shape, float("nan"), dtype=dtype, device=tokens.words.device)
        return binary_linear(tokens, self.weight, self.bias, out=out, config=config).cpu()

    def expected(self):
        u = self.activations.codes.long() - self.activations.zero_point.long()
        groups = self.scale.shape[1]
        out = torch.zeros(u.shape[0], self.scale.shape[0])
        for g, part in enumerate(u.split(u.shape[1] // groups, dim=1)):
            out += (part @ self.centred[:, g].t()).float() * self.scale[:, g].float()
        return out * self.activations.scale + self.bias.cpu()


@pytest.mark.parametrize("w_bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("a_bits", range(2, 9))
def test_decode_gives_the_bits_of_an_int64_product(kernels, w_bits, a_bits):
    case = Case(1, 37, 800, w_bits, a_bits)

    assert torch.equal(case.run(BITS), case.expected())


@pytest.mark.parametrize("m", [2, 3, 7, 9])
@pytest.mark.parametrize("a_bits", [2, 4, 8])
def test_decode_takes_several_tokens(kernels, m, a_bits):
    case = Case(m, 20, 512, 2, a_bits)

    assert torch.equal(case.run(BITS), case.expected())


@pytest.mark.parametrize(
    "config",
    [
        LaunchConfig(row_tiles=2, column_tiles=0, warps_n=1, warps_other=2, steps=2),
        LaunchConfig(row_tiles=4, column_tiles=0, warps_n=2, warps_other=1, steps=1),
        LaunchConfig(row_tiles=1, column_tiles=0, warps_n=1, warps_other=16, steps=4),
    ],
)
def test_every_way_to_share_the_work_gives_the_same_bits(kernels, config):
    case = Case(2, 100, 1280, 2, 4)

    assert torch.equal(case.run(BITS, config), case.expected())


@pytest.mark.parametrize(("m", "a_bits"), [(1, 8), (1, 2), (3, 4), (5, 8)])
@pytest.mark.parametrize(("w_bits", "multiplier"), [(2, 1), (3, 2), (8, 1)])
def test_groups_of_128_are_exact_but_for_the_order_of_their_sum(
    kernels, m, a_bits, w_bits, multiplier
):
    case = Case(m, 21, 640, w_bits, a_bits, groups=5, multiplier=multiplier)

    actual, expected = case.run(BITS), case.expected()

    # five products of integers below 2^24 and float16 scales, each rounded once, and their sum
    bound = case.centred.abs().sum((1, 2)).float() * 255 * case.scale.float().amax(1)
    bound = bound * case.activations.scale * 6 * 2**-24 + 2e-6
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize(("w_bits", "a_bits"), [(1, 2), (2, 2), (1, 4), (3, 2), (2, 3), (1, 8)])
@pytest.mark.parametrize(("steps", "stages"), [(1, 2), (2, 3), (1, 4)])
def test_prefill_gives_the_bits_of_an_int64_product(copies, w_bits, a_bits, steps, stages):
    case = Case(19, 70, 800, w_bits, a_bits)

    actual = case.run(TOKENS, replace(SMALL, steps=steps, stages=stages))

    assert torch.equal(actual, case.expected())


# a GPU has tiles of powers of two alone; three show the order of an odd number
@pytest.mark.parametrize(("row_tiles", "warps_n"), [(2, 2), (4, 1), *([] if GPU else [(3, 1)])])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 2), (1, 3), (3, 2)])
def test_rows_of_a_warp_rotate_in_turn(copies, row_tiles, warps_n, steps, w_bits, a_bits):
    case = Case(19, 70, 1500, w_bits, a_bits)
    config = replace(SMALL, row_tiles=row_tiles, warps_n=warps_n, steps=steps)

    assert torch.equal(case.run(TOKENS, config), case.expected())


@pytest.mark.parametrize("order", ColumnOrder)
def test_half_step_grids_double_the_product(copies, order):
    case = Case(3, 40, 256, 2, 2, multiplier=2)
    config = SMALL if order is TOKENS else None

    assert torch.equal(case.run(order, config), case.expected())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_outputs_are_rounded_once(kernels, dtype):
    case = Case(2, 33, 256, 4, 8)

    assert torch.equal(case.run(BITS, dtype=dtype), case.expected().to(dtype))


@pytest.mark.parametrize("order", ColumnOrder)
def test_the_reference_gives_the_same_bits(order):
    case = Case(3, 40, 320, 3, 3, multiplier=2)
    tokens = FragmentTokens.from_tokens(case.tokens, order)

    assert torch.equal(
        binary_linear_reference(tokens, case.weight, case.bias).cpu(), case.expected()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("order", ColumnOrder)
@pytest.mark.parametrize(("w_bits", "a_bits"), [(1, 2), (2, 2), (1, 8), (2, 4)])
def test_every_launch_worth_timing_is_exact_on_a_gpu(order, w_bits, a_bits):
    m = 200 if order is TOKENS else 2
    case = Case(m, 1040, 4096, w_bits, a_bits)
    shape = ProductShape(order=order, m=m, n=1040, k=4096, weight_bits=w_bits, token_bits=a_bits)

    results = [case.run(order, config) for config in binary_configs(shape)]

    assert all(torch.equal(result, case.expected()) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 11008, 28672])
@pytest.mark.parametrize("m", [1, 3, 8, 129])
def test_long_rows_and_many_runs_give_the_same_bits_on_a_gpu(k, m):
    order, a_bits = (TOKENS, 2) if m > 8 else (BITS, 8)
    case = Case(m, 272, k, 2, a_bits)
    expected = case.expected()

    assert all(torch.equal(case.run(order), expected) for _ in range(20))


@pytest.mark.parametrize(("order", "m", "a_bits"), [(BITS, 2, 8), (TOKENS, 3, 2)])
def test_tokens_of_a_sliced_weight_may_be_longer_than_the_bits(copies, order, m, a_bits):
    case = Case(m, 20, 700, 2, a_bits)
    expected = case.expected()
    # three steps hold bits; blocks of eight slices of 128 bytes end a step later
    codes = torch.nn.functional.pad(case.tokens.codes, (0, 1024 - 700))
    case.tokens = replace(case.tokens, codes=codes)

    longer = FragmentTokens.from_tokens(case.tokens, order)

    assert (longer.words.shape[1], case.weight.planes.shape[1]) == (4, 3)
    assert torch.equal(case.run(order), expected)
    assert torch.equal(binary_linear_reference(longer, case.weight, case.bias).cpu(), expected)


def test_operands_that_do_not_fit_are_refused():
    case, longer = Case(2, 16, 256, 2, 4), Case(2, 16, 512, 2, 4, groups=4)
    tokens = FragmentTokens.from_tokens(case.tokens, BITS)
    out = torch.zeros(2, 16)

    with pytest.raises(ValueError, match="1 steps do not fit K = 512"):
        binary_linear(tokens, longer.weight, out=out)
    with pytest.raises(ValueError, match=r"no contiguous \[2, 16\]"):
        binary_linear(tokens, case.weight, out=out.t())
    with pytest.raises(ValueError, match="4 groups: columns of tokens"):
        binary_linear(FragmentTokens.from_tokens(longer.tokens, TOKENS), longer.weight, out=out)


@pytest.mark.parametrize("m", [1, 2, 8, 2048])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(1, 2), (2, 2), (2, 8), (4, 4), (8, 8)])
def test_every_launch_fits_the_machine(m, w_bits, a_bits):
    order = TOKENS if m > 64 else BITS
    shape = ProductShape(order=order, m=m, n=4096, k=4096, weight_bits=w_bits, token_bits=a_bits)
    chosen = select_config(shape)

    for config in [chosen, *binary_configs(shape)]:
        assert config.num_warps <= 16
        assert config.row_tiles % config.warps_n == 0
        planes = config.row_tiles * w_bits + config.column_tiles * a_bits
        assert order is BITS or config.stages * config.steps * planes * 512 <= 227 << 10


def test_a_table_overrules_the_choice():
    shape = ProductShape(order=BITS, m=1, n=64, k=256, weight_bits=1, token_bits=2)

    assert select_config(shape, {shape: SMALL}) is SMALL


POINTERS = {
    "w_ptr": "*i32", "x_ptr": "*i32", "w_scale_ptr": "*fp16", "w_zero_ptr": "*i32",
    "w_sums_ptr": "*i32", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "x_sums_ptr": "*i32",
    "bias_ptr": "*fp32", "out_ptr": "*fp16",
}  # fmt: skip
STRIDES = ("stride_wn", "stride_wk", "stride_wp", "stride_xm", "stride_xk", "stride_om")


def machine_code(shape, config, *, grouped=False):
    types = POINTERS | dict.fromkeys((*STRIDES, "M", "N", "K", "T", "B", "J"), "i32")
    constants = {
        "P": shape.weight_bits, "SHIFT": 128 if shape.token_bits == 8 else 0, "MULTIPLIER": 1,
        "HAS_BIAS": True, "ROW_TILES": config.row_tiles, "WARPS_N": config.warps_n,
        "STEPS": config.steps,
    }  # fmt: skip
    name = "bmma_prefill_kernel"
    if shape.order is TOKENS:
        constants |= {
            "Q": shape.token_bits, "COLUMN_TILES": config.column_tiles,
            "WARPS_M": config.warps_other, "STAGES": config.stages,
        }  # fmt: skip
    else:
        name = "bmma_decode_kernel"
        width = columns_a_token(shape.token_bits)
        types |= {"S": "i32", "w_zero_ptr": "*u8" if grouped else "*i32"}
        constants |= {
            "COLUMN_TILES": -(-shape.m * width // 16), "HALVES": 1 if shape.m * width <= 8 else 2,
            "WIDTH": width, "WARPS_K": config.warps_other, "GROUPED": grouped,
            "TURNS": -(-shape.k // (256 * config.steps * config.warps_other)),
        }  # fmt: skip
    return compile_kernel(
        f"kernels.{KERNELS[name].removesuffix('.py')}", name, types=types, constants=constants,
        unaligned=("M", "T", "B", "J", "S"), num_warps=config.num_warps,
    )  # fmt: skip


@pytest.mark.parametrize(("w_bits", "a_bits"), [(1, 2), (2, 2)])
def test_prefill_issues_two_and_a_half_instructions_a_product(w_bits, a_bits):
    shape = ProductShape(
        order=TOKENS, m=2048, n=4096, k=4096, weight_bits=w_bits, token_bits=a_bits
    )
    config = select_config(shape)

    code = machine_code(shape, config)

    # 32 products a plane pair and step of a warp's 64 x 64
    steps = config.stages * config.steps
    assert code.count_in_loop("BMMA.168256.AND.POPC") == steps * 32 * w_bits * a_bits
    assert code.count_in_loop() <= 2.6 * code.count_in_loop("BMMA")
    # a fragment of tokens is read once, one of weights for each plane it meets, if not kept
    assert code.count_in_loop("LDS.128") <= steps * 4 * (w_bits + 1) * a_bits
    # a chunk's copies are waited for once, and none of them waits for another
    assert code.count_in_loop("BAR") == config.stages
    assert code.count_in_loop("LDGSTS.E.BYPASS.128") > 0
    assert code.count("STG.E.128") > 0
    assert code.spills == 0


@pytest.mark.parametrize(
    ("w_bits", "m", "grouped", "budget"),
    # instructions a weight that memory speed allows (docs: 1.23 a bit); counted: all of the kernel
    [(1, 1, False, 1.23), (2, 1, False, 2.46), (4, 1, False, 4.9), (2, 1, True, 2.46)],
)
def test_decode_stays_below_the_issue_rate_at_memory_speed(w_bits, m, grouped, budget):
    shape = ProductShape(order=BITS, m=m, n=22016, k=4096, weight_bits=w_bits, token_bits=8)
    config = select_config(shape)

    code = machine_code(shape, config, grouped=grouped)

    turns = -(-shape.k // (256 * config.steps * config.warps_other))
    in_loop = code.count_in_loop()
    issued = len(code.instructions) + in_loop * (turns - 1)
    weights = config.row_tiles * 16 * shape.k / (32 * config.num_warps)
    assert code.count("BMMA.168128" if grouped else "BMMA.168256") > 0
    assert code.count("LDG.E.EF.128") > 0
    assert issued <= budget * weights
    assert code.spills == 0

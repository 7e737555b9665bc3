import sys
from dataclasses import replace

import pytest
import torch

from engine.numerics.hadamard import factors_of, hadamard
from kernels.layer_math import Gate
from kernels.token_parts import make_slots
from tests.kernels.conftest import load_kernel_module
from tests.kernels.small_ops import load_small_op


@pytest.fixture
def rotated(monkeypatch, device):
    interpreted = device == "cpu"
    for name in ("_token_kernel", "_token_tile"):
        kernel = load_kernel_module(name, interpreted=interpreted, monkeypatch=monkeypatch)
        monkeypatch.setitem(sys.modules, f"kernels.{name}", kernel)
    return load_small_op("rotated_tokens", None, monkeypatch)


def transform_of(rotated, block, device):
    parts = factors_of(block, device)
    return rotated.Transform(left=parts.left, right=parts.right)


def assert_close(tokens, expected):
    # sums in another order may move a value over the border of two codes
    assert torch.allclose(tokens.scale, expected.scale, rtol=1e-2)
    apart = (tokens.codes.int() - expected.codes.int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 0.01


# one block, several blocks, factors that are no power of two
@pytest.mark.parametrize(("k", "block"), [(256, 256), (768, 256), (12 * 12, 12 * 12), (640, 320)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [None, Gate.SILU])
def test_it_quantizes_what_the_engine_transforms(rotated, device, k, block, dtype, step):
    form = rotated.TokenForm(bits=8, columns=k + 16)
    x = torch.randn(2, k if step is None else 2 * k, device=device).to(dtype)
    transform = transform_of(rotated, block, device)
    poison = rotated.new_tokens(x, k, form, None)
    poison.codes.fill_(77)

    tokens = rotated.quantize_rotated(x, transform, form, step=step, out=poison)

    assert_close(tokens, rotated.quantize_rotated_reference(x, transform, form, step=step))
    assert not tokens.codes[:, k:].any()
    assert torch.equal(tokens.sums, tokens.codes.sum(1, keepdim=True, dtype=torch.int32))


def test_the_reference_is_the_engine_s_transform(rotated):
    x = torch.randn(3, 320)
    form = rotated.TokenForm(bits=8)

    got = rotated.quantize_rotated_reference(x, transform_of(rotated, 320, "cpu"), form)

    assert_close(got, rotated.quantize_tokens_reference(hadamard(x, factors_of(320)), form))


def test_sums_of_groups_are_those_of_the_codes(rotated, device):
    form = rotated.TokenForm(bits=4, groups=8)
    x = torch.randn(2, 512, device=device)

    tokens = rotated.quantize_rotated(x, transform_of(rotated, 256, device), form)

    sums = tokens.codes.view(2, 8, 64).sum(-1, dtype=torch.int32)
    assert torch.equal(tokens.sums, sums)


def test_a_block_that_does_not_fit_is_refused(rotated):
    transform = transform_of(rotated, 256, "cpu")

    with pytest.raises(ValueError, match="16 x 16 on 300 features"):
        rotated.quantize_rotated(torch.zeros(1, 300), transform, rotated.TokenForm(bits=8))


@pytest.fixture
def slots(device):
    return make_slots(torch.device(device))


def shared(rotated, parts):
    return rotated.LaunchConfig(parts=parts, num_warps=4)


# whole blocks, some of them nobody's; columns of one block, of factors that are no power of two
@pytest.mark.parametrize(
    ("k", "block", "parts"),
    [(768, 256, 2), (1280, 256, 4), (256, 256, 2), (640, 640, 2), (28 * 40, 28 * 40, 4)],
)
def test_parts_give_the_codes_of_one_program(rotated, device, slots, k, block, parts):
    form = rotated.TokenForm(bits=8, columns=k + 16)
    transform = transform_of(rotated, block, device)
    # integers, whose sums have no order
    x = torch.randint(-99, 100, (2, k), device=device).float()
    out = rotated.new_tokens(x, k, form, None)
    for each in (out.codes, out.scale, out.zero_point, out.sums):
        each.fill_(77)

    tokens = rotated.quantize_rotated(
        x, transform, form, out=out, config=shared(rotated, parts), slots=slots
    )

    alone = rotated.quantize_rotated(x, transform, form)
    for field in ("codes", "scale", "zero_point", "sums"):
        assert torch.equal(getattr(tokens, field), getattr(alone, field)), field


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("k", "block"), [(768, 256), (640, 640)])
def test_parts_gate_what_they_transform(rotated, device, slots, k, block):
    form = rotated.TokenForm(bits=8)
    x, transform = torch.randn(3, 2 * k, device=device), transform_of(rotated, block, device)

    tokens = rotated.quantize_rotated(
        x, transform, form, step=Gate.SILU, config=shared(rotated, 4), slots=slots
    )

    expected = rotated.quantize_rotated_reference(x, transform, form, step=Gate.SILU)
    assert_close(tokens, expected)
    assert torch.equal(tokens.sums, tokens.codes.sum(1, keepdim=True, dtype=torch.int32))


# parts of two blocks each; one block, which is not shared then
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("k", "block", "groups"), [(1536, 256, 12), (512, 512, 8)])
def test_parts_own_whole_groups_or_one_program_takes_them(rotated, device, slots, k, block, groups):
    form = rotated.TokenForm(bits=4, groups=groups)
    x, transform = torch.randn(2, k, device=device), transform_of(rotated, block, device)

    tokens = rotated.quantize_rotated(x, transform, form, config=shared(rotated, 4), slots=slots)

    sums = tokens.codes.view(2, groups, -1).sum(-1, dtype=torch.int32)
    assert torch.equal(tokens.sums, sums)
    assert_close(tokens, rotated.quantize_rotated_reference(x, transform, form))


@pytest.mark.parametrize("block", [256, 14336])
def test_tokens_are_gated_alike_in_every_batch(rotated, block):
    transform = transform_of(rotated, block, "cpu")

    chosen = [
        rotated.select_config(14336, transform, m=m, shared=shared)
        for m in (1, 4, 8, 9, 64, 2048)
        for shared in (False, True)
    ]

    assert {config.native_exp for config in chosen} == {True}


def test_few_wide_tokens_are_shared_by_blocks_or_columns(rotated):
    blocks = transform_of(rotated, 256, "cpu")
    one = transform_of(rotated, 14336, "cpu")

    assert rotated.select_config(11008, blocks, shared=True).parts == 16
    assert rotated.select_config(14336, one, m=4, shared=True).parts == 8
    assert rotated.select_config(14336, one, m=8, shared=True).parts == 4
    for alone in (
        rotated.select_config(11008, blocks),
        rotated.select_config(14336, one, m=9, shared=True),
        rotated.select_config(4096, blocks, shared=True),
    ):
        assert alone.parts == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("k", "block", "p"), [(11008, 256, 16), (14336, 14336, 8), (28672, 28672, 16)]
)
def test_parts_of_wide_tokens_have_the_bits_of_one_program(rotated, device, slots, k, block, p):
    form = rotated.TokenForm(bits=8, columns=k + 256)
    transform = transform_of(rotated, block, device)
    for m in (1, 8, 1, 5):
        x = torch.randn(m, 2 * k, device=device).bfloat16()
        alone = rotated.quantize_rotated(x, transform, form, step=Gate.SILU)
        chosen = rotated.select_config(k, transform, m=m, shared=True)

        for config in (chosen, replace(chosen, parts=p // 4, chunk=32)):
            tokens = rotated.quantize_rotated(
                x, transform, form, step=Gate.SILU, config=config, slots=slots
            )

            for field in ("codes", "scale", "zero_point", "sums"):
                assert torch.equal(getattr(tokens, field), getattr(alone, field)), (field, config)

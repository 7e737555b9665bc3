import sys

import pytest
import torch

from engine.numerics.hadamard import factors_of, hadamard
from kernels.layer_math import Gate
from tests.kernels.conftest import load_kernel_module
from tests.kernels.small_ops import load_small_op


@pytest.fixture
def rotated(monkeypatch, device):
    interpreted = device == "cpu"
    kernel = load_kernel_module("_token_kernel", interpreted=interpreted, monkeypatch=monkeypatch)
    monkeypatch.setitem(sys.modules, "kernels._token_kernel", kernel)
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

import pytest
import torch

from kernels.column_rounding import WIDTH, round_columns, round_columns_reference


def a_block(rows, columns, max_code, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    moments = torch.randn(columns, 4 * columns, generator=generator)
    covariance = moments @ moments.T / columns + 0.1 * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(covariance), upper=True)
    weight = torch.randn(rows, columns + 3, generator=generator)
    scale = torch.rand(rows, columns, generator=generator) * 4 / max_code + 0.01
    zero = torch.randint(0, max_code + 1, (rows, columns), generator=generator).float()
    return tuple(each.to(device) for each in (weight, scale, zero, upper.contiguous()))


@pytest.mark.parametrize(
    ("rows", "columns", "max_code"),
    [(1, 1, 3), (3, 7, 1), (3, 7, 3), (3, 7, 15), (3, 7, 255), (16, WIDTH, 15), (37, 96, 3)],
)
def test_the_kernel_walks_columns_as_the_reference_does(
    column_rounding, device, rows, columns, max_code
):
    weight, scale, zero, upper = a_block(rows, columns, max_code, device)
    expected = weight.clone()
    wanted = round_columns_reference(expected[:, :columns], scale, zero, upper, max_code)

    launch = column_rounding.launch_round_columns
    errors = launch(weight[:, :columns], scale, zero, upper, max_code)

    assert torch.equal(errors, wanted)
    assert torch.equal(weight, expected)


def test_levels_of_a_half_step_grid_lie_beside_zero(column_rounding, device):
    weight, scale, zero, upper = a_block(5, 32, 3, device)
    expected = weight.clone()
    wanted = round_columns_reference(expected[:, :32], scale, zero, upper, 3, 0.5)

    errors = column_rounding.launch_round_columns(weight[:, :32], scale, zero, upper, 3, 0.5)

    assert torch.equal(errors, wanted)
    assert torch.equal(weight, expected)


def test_columns_beyond_the_block_are_left_alone():
    weight, scale, zero, upper = a_block(4, 16, 7)
    before = weight[:, 16:].clone()

    round_columns(weight[:, :16], scale, zero, upper, 7)

    assert torch.equal(weight[:, 16:], before)


def test_a_block_that_is_too_wide_is_refused():
    weight, scale, zero, upper = a_block(2, WIDTH + 1, 3)

    with pytest.raises(ValueError, match=f"at most {WIDTH}"):
        round_columns(weight[:, : WIDTH + 1], scale, zero, upper, 3)

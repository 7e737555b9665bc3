import pytest
import torch

from kernels.layouts import pack_codes, packed_words, unpack_codes


@pytest.mark.parametrize("planes", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (2, 32), (5, 33), (7, 200)])
def test_packing_loses_nothing(planes, rows, columns):
    codes = torch.randint(0, 1 << planes, (rows, columns), dtype=torch.uint8)

    packed = pack_codes(codes, planes)

    assert packed.dtype == torch.int32
    assert packed.shape == (planes, rows, packed_words(columns))
    assert torch.equal(unpack_codes(packed, columns), codes)


def test_bit_j_of_word_w_in_plane_b_is_bit_b_of_column_32w_plus_j():
    codes = torch.randint(0, 8, (4, 96), dtype=torch.uint8)

    packed = pack_codes(codes, 3).tolist()

    for plane in range(3):
        for row in range(4):
            for column in range(96):
                bit = (packed[plane][row][column // 32] >> (column % 32)) & 1
                assert bit == (int(codes[row, column]) >> plane) & 1


def test_three_bits_cost_three_bits():
    packed = pack_codes(torch.zeros(16, 256, dtype=torch.uint8), 3)

    assert packed.nbytes * 8 == 3 * 16 * 256


def test_columns_beyond_the_last_are_stored_as_zero():
    packed = pack_codes(torch.full((1, 33), 15, dtype=torch.uint8), 4)

    assert packed[:, 0, 1].tolist() == [1, 1, 1, 1]


def test_the_five_levels_of_bit_balance_fit_three_planes():
    codes = torch.arange(5, dtype=torch.uint8).repeat(2, 13)

    assert torch.equal(unpack_codes(pack_codes(codes, 3), 65), codes)


def test_transposed_codes_pack_like_contiguous_ones():
    codes = torch.randint(0, 16, (40, 6), dtype=torch.uint8)

    assert torch.equal(pack_codes(codes.t(), 4), pack_codes(codes.t().contiguous(), 4))


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="code 4 does not fit 2 planes"):
        pack_codes(torch.tensor([[0, 4]], dtype=torch.uint8), 2)


def test_codes_of_another_type_are_refused():
    with pytest.raises(ValueError, match="must be uint8"):
        pack_codes(torch.zeros(2, 32), 2)


@pytest.mark.parametrize("columns", [32, 65])
def test_words_of_another_width_are_refused(columns):
    packed = pack_codes(torch.zeros(2, 64, dtype=torch.uint8), 2)

    with pytest.raises(ValueError, match="no bit-planes"):
        unpack_codes(packed, columns)

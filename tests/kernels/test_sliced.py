import pytest
import torch

from kernels import sliced
from kernels.layouts import pack_codes, unpack_codes
from kernels.sliced import (
    StoredWeight,
    choose_slice_bytes,
    field_widths,
    shard_columns,
    shard_rows,
    slice_weight,
    unslice_codes,
)


def stored(n, k, bits, groups=1):
    return StoredWeight(
        packed=pack_codes(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits),
        scale=torch.rand(n, groups).add(0.1).half(),
        zero_point=torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8),
        in_features=k,
    )


def sliced_of(weight, **layout):
    return slice_weight(
        weight.packed, weight.scale, weight.zero_point, weight.in_features, **layout
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("slice_bytes", [32, 64, 128])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 1024), (70, 300), (129, 1056)])
def test_slicing_loses_nothing_whatever_the_tails(bits, slice_bytes, n, k):
    weight = stored(n, k, bits)
    block_rows = 64 if n % 2 else 128

    got = sliced_of(weight, slice_bytes=slice_bytes, block_rows=block_rows)

    assert torch.equal(unslice_codes(got), unpack_codes(weight.packed, k))
    assert got.columns % (8 * slice_bytes) == 0
    assert sum(f.nbytes for f in got.fields) * 8 == got.padded_rows * got.columns * bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_lies_where_the_formula_says(bits):
    g, bn, n, k = 32, 64, 3, 512
    weight = stored(n, k, bits)
    codes = unpack_codes(weight.packed, k)

    got = sliced_of(weight, slice_bytes=g)

    for row, column in [(0, 0), (2, 31), (1, 32), (0, 255), (2, 256), (1, 511)]:
        kb, inside = divmod(column, 8 * g)
        value, shift = 0, 0
        for field, f in zip(got.fields, got.field_bits, strict=True):
            assert field.shape == (2, 1, f, bn, g)
            slot, j = divmod(inside, g)
            r, i = divmod(slot, 8 // f)
            part = (int(field[kb, 0, r, row, j]) >> (f * i)) & ((1 << f) - 1)
            value |= part << shift
            shift += f
        assert (value ^ 128 if bits == 8 else value) == int(codes[row, column])


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_single_code_sets_its_own_bits_and_no_others(bits):
    for row, column in [(0, 0), (5, 77), (63, 255), (64, 256)]:
        codes = torch.zeros(65, 300, dtype=torch.uint8)
        codes[row, column] = (1 << bits) - 1
        packed = pack_codes(codes, bits)
        ones = torch.ones(65, 1)

        got = slice_weight(packed, ones.half(), ones.byte(), 300, slice_bytes=32)

        assert torch.equal(unslice_codes(got), codes)
        if bits < 8:
            assert sum(int(f.count_nonzero()) for f in got.fields) == len(got.fields)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_zero_points_and_sums_follow_the_shift_and_rows_beyond_the_last_are_zero(bits):
    weight = stored(70, 256, bits, groups=2)
    shift = 128 if bits == 8 else 0
    codes = unpack_codes(weight.packed, 256).int() - shift

    got = sliced_of(weight)

    assert torch.equal(got.sums[:70], codes.view(70, 2, 128).sum(-1).int())
    assert torch.equal(got.zero_point[:70], weight.zero_point.int() - shift)
    assert torch.equal(got.zero_codes[:70], weight.zero_point)
    for tensor in (got.sums, got.zero_point, got.scale):
        assert tensor.shape == (128, 2)
        assert not tensor[70:].any()


def test_half_steps_become_odd_zero_points_of_twice_the_code():
    weight = stored(64, 256, 2)

    got = sliced_of(weight, half_step=True)

    assert got.multiplier == 2
    assert got.scale.dtype == torch.float32
    codes = unslice_codes(got).float()
    levels = got.scale * (2 * codes - got.zero_point)
    assert torch.equal(levels, weight.scale.float() * (codes - weight.zero_point - 0.5))


def test_a_conversion_in_chunks_gives_the_same_slices(monkeypatch):
    weight = stored(300, 512, 3, groups=4)
    whole = sliced_of(weight)

    monkeypatch.setattr(sliced, "CHUNK_CODES", 1)
    pieces = sliced_of(weight)

    assert all(torch.equal(a, b) for a, b in zip(whole.fields, pieces.fields, strict=True))
    assert torch.equal(whole.sums, pieces.sums)


def test_fields_are_cut_widest_first():
    widths = [field_widths(bits) for bits in range(1, 9)]

    assert widths == [(1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,)]


@pytest.mark.parametrize(
    ("k", "groups", "slice_bytes"),
    [
        (4096, 1, 128), (11008, 1, 128), (13824, 1, 64), (14336, 1, 128), (28672, 1, 128),
        (300, 1, 64), (4096, 32, 64), (4096, 64, 32), (4096, 128, 32), (11008, 86, 64), (96, 1, 32),
    ],
)  # fmt: skip
def test_slices_are_as_wide_as_padding_and_groups_allow(k, groups, slice_bytes):
    assert choose_slice_bytes(k, groups) == slice_bytes


@pytest.mark.parametrize("groups", [1, 4])
def test_shards_of_rows_and_columns_are_the_parts_of_the_whole(groups):
    weight = stored(96, 512, 3, groups)
    codes = unpack_codes(weight.packed, 512)

    rows = shard_rows(weight, 32, 80)
    columns = shard_columns(weight, 128, 384)

    assert torch.equal(unslice_codes(sliced_of(rows)), codes[32:80])
    assert torch.equal(unslice_codes(sliced_of(columns)), codes[:, 128:384])
    kept = slice(None) if groups == 1 else slice(1, 3)
    assert torch.equal(columns.scale, weight.scale[:, kept])
    assert torch.equal(rows.zero_point, weight.zero_point[32:80])


def test_the_last_shard_of_columns_may_end_inside_a_word():
    weight = stored(4, 100, 2)

    assert shard_columns(weight, 64, 100).in_features == 36


@pytest.mark.parametrize(("start", "stop"), [(16, 64), (0, 40), (64, 64), (0, 300)])
def test_a_shard_that_cuts_a_block_is_refused(start, stop):
    with pytest.raises(ValueError, match=f"columns {start} to {stop}"):
        shard_columns(stored(2, 256, 2), start, stop)


def test_rows_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="rows 1 to 3"):
        shard_rows(stored(2, 32, 2), 1, 3)


def test_a_group_that_cuts_a_slice_is_refused():
    with pytest.raises(ValueError, match="slice_bytes 64 do not divide a group of 32"):
        sliced_of(stored(2, 64, 2, groups=2), slice_bytes=64)
    with pytest.raises(ValueError, match="slices of 32"):
        choose_slice_bytes(96, 6)


def test_rows_whose_product_leaves_int32_are_refused():
    packed = torch.zeros(8, 1, 1040, dtype=torch.int32)
    zero = torch.zeros(1, 1, dtype=torch.uint8)

    with pytest.raises(ValueError, match="overflow int32"):
        slice_weight(packed, torch.ones(1, 1).half(), zero, 33280)


@pytest.mark.parametrize("layout", [{"slice_bytes": 48}, {"block_rows": 32}])
def test_unknown_layouts_are_refused(layout):
    with pytest.raises(ValueError, match="is none of"):
        sliced_of(stored(2, 64, 2), **layout)


def test_tensors_that_do_not_fit_each_other_are_refused():
    weight = stored(4, 64, 2)

    with pytest.raises(ValueError, match="do not make a weight"):
        slice_weight(weight.packed, weight.scale[:3], weight.zero_point[:3], 64)
    with pytest.raises(ValueError, match="2 words do not hold K = 96"):
        slice_weight(weight.packed, weight.scale, weight.zero_point, 96)

"""Weights in slices, the layout that products on a GPU read; derived at load from stored planes.

    code = sum of field << shift        fields of 4, 2 and 1 bits, widest first, lowest bits first
    field of k = kb 8G + (r 8/f + i) G + j   lies in bits [f i, f i + f) of byte j of run r

    field [L/8G, NP/BN, f, BN, G]        per block kb of 8G columns and block of BN rows: f runs
                                         of BN rows, each a slice of G bytes

3 bits are fields 2 and 1, 5 are 4 and 1, 6 are 4 and 2, 7 are 4, 2 and 1. Codes of 8 bits are one
field of signed bytes, code - 128, their zero-points and sums shifted alike. A mask of one byte
yields G consecutive columns, so four lanes of a word are four consecutive codes.

    w = scale (multiplier code - zero_point)       multiplier 2 where levels lie half a step apart

Columns beyond K and rows beyond N hold zero.

Shape legend: N rows, NP rows padded to BN, K columns, L columns padded to 8G, S groups, P planes,
W = ceil(K / 32) words.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.group_rows import GroupRows, pack_group_rows, zero_terms
from kernels.layouts import WORD_BITS, unpack_codes

__all__ = [
    "SlicedWeight", "StoredWeight", "choose_slice_bytes", "field_widths", "shard_columns",
    "shard_rows", "slice_weight", "unslice_codes",
]  # fmt: skip

BYTE_BITS = 8
BYTE_SHIFT = 128
MAX_ACTIVATION_CODE = 255
INT32_END = 1 << 31
SLICE_BYTES = (128, 64, 32)
LITTLE_PADDING = 0.03
"""Of K: what wide slices may cost in bytes."""
BLOCK_ROWS = (64, 128)
CHUNK_CODES = 1 << 24
"""Codes unpacked at a time: the transient tensors of a conversion stay near 100 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """The tensors of a checkpoint that make one weight, to be cut into shards."""

    packed: torch.Tensor
    """int32 ``[P, N, W]``."""
    scale: torch.Tensor
    """float16 ``[N, S]``."""
    zero_point: torch.Tensor
    """uint8 ``[N, S]``."""
    in_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedWeight:
    """One weight in layout R with what its products need."""

    fields: tuple[torch.Tensor, ...]
    """uint8 ``[L/8G, NP/BN, f, BN, G]`` each."""
    field_bits: tuple[int, ...]
    """f of every field."""
    scale: torch.Tensor
    """float16 or, on half-step grids, float32 ``[NP, S]``."""
    zero_point: torch.Tensor
    """int32 ``[NP, S]``."""
    zero_codes: torch.Tensor
    """uint8 ``[NP, S]``: the stored zero-points, a quarter of the bytes where groups are many."""
    sums: torch.Tensor
    """int32 ``[NP, S]``: codes summed over a group."""
    terms: torch.Tensor
    """float32 ``[NP]``: the sum of a row's levels, which a token's zero-point multiplies."""
    in_features: int
    out_features: int
    columns: int
    """L."""
    bits: int
    multiplier: int
    group_rows: GroupRows | None = None
    """Where columns have scales in groups and the pipelined product can serve them."""

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor."""
        per_row = (self.scale, self.zero_point, self.zero_codes, self.sums, self.terms)
        rows = () if self.group_rows is None else (self.group_rows.rows, self.group_rows.terms)
        return sum(each.nbytes for each in (*self.fields, *per_row, *rows))

    @property
    def slice_bytes(self) -> int:
        """G."""
        return self.fields[0].shape[-1]

    @property
    def block_rows(self) -> int:
        """BN."""
        return self.fields[0].shape[-2]

    @property
    def padded_rows(self) -> int:
        """NP."""
        return self.scale.shape[0]

    @property
    def groups(self) -> int:
        """S."""
        return self.scale.shape[1]

    @property
    def group_size(self) -> int:
        """K / S."""
        return self.in_features // self.groups


def field_widths(bits: int) -> tuple[int, ...]:
    """Cut a code into fields, the widest first: ``7 -> (4, 2, 1)``, ``8 -> (8,)``.

    Raises:
        ValueError: if ``bits`` is not 1..8.
    """
    if not 1 <= bits <= BYTE_BITS:
        raise ValueError(f"bits must be 1 to {BYTE_BITS}, got {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def choose_slice_bytes(in_features: int, groups: int = 1) -> int:
    """Choose G: the widest slice that pads K little, else the one that pads it least.

    Wide slices cost fewer instructions and are read in longer runs. A scale group is whole slices,
    at least two where that can be: every lane that shares a slice repeats the work on its scale.

    Raises:
        ValueError: if a group is no multiple of 32 columns.
    """
    fitting = list(SLICE_BYTES)
    if groups > 1:
        group = in_features // groups
        if in_features % groups or group % SLICE_BYTES[-1]:
            raise ValueError(f"{groups} groups do not cut K = {in_features} into slices of 32")
        fitting = [g for g in SLICE_BYTES if g == SLICE_BYTES[-1] or group % (2 * g) == 0]
    little = in_features * (1 + LITTLE_PADDING)
    padded = {g: _padded(in_features, BYTE_BITS * g) for g in fitting}
    return min(fitting, key=lambda g: (max(little, padded[g]), -g))


def slice_weight(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    *,
    half_step: bool = False,
    slice_bytes: int | None = None,
    block_rows: int | None = None,
) -> SlicedWeight:
    """Derive the slices of a stored weight, some rows at a time, on the device it lies on.

    Args:
        packed: int32 ``[P, N, W]``.
        scale: float16 ``[N, S]``.
        zero_point: uint8 ``[N, S]``.
        in_features: K.
        half_step: levels lie at ``scale (code - zero_point - 1/2)``.
        slice_bytes: G, 32, 64 or 128; None chooses.
        block_rows: BN, 64 or 128; None takes 64.

    Raises:
        ValueError: if shapes do not fit each other or K, G does not fit a group, or int32 cannot
            hold a product with activations of 8 bits.
    """
    _check_stored(packed, scale, zero_point, in_features)
    bits, n, _ = packed.shape
    groups = scale.shape[1]
    g = choose_slice_bytes(in_features, groups) if slice_bytes is None else slice_bytes
    bn = BLOCK_ROWS[0] if block_rows is None else block_rows
    _check_layout(g, bn, in_features, groups)
    widths, np_rows, columns = field_widths(bits), _padded(n, bn), _padded(in_features, 8 * g)
    shape = (columns // (BYTE_BITS * g), np_rows // bn)
    fields = [packed.new_empty((*shape, f, bn, g), dtype=torch.uint8) for f in widths]
    sums = packed.new_zeros((np_rows, groups))
    for rows in _row_chunks(n, bn, columns):
        codes = unpack_codes(packed[:, rows], in_features)
        kept = codes.shape[0]
        sums[rows][:kept] = codes.view(kept, groups, -1).sum(-1, dtype=torch.int32)
        blocks = slice(rows.start // bn, -(-rows.stop // bn))
        _write_fields(fields, codes, blocks)
    shift = BYTE_SHIFT if bits == BYTE_BITS else 0
    sums[:n] -= shift * (in_features // groups)
    multiplier = 2 if half_step else 1
    zero = multiplier * (zero_point.to(torch.int32) - shift) + (multiplier - 1)
    _check_range(zero, bits, multiplier, in_features // groups)
    scale, zero = _pad_rows(scale, np_rows), _pad_rows(zero, np_rows)
    group_rows = None
    if groups > 1:
        group_rows = pack_group_rows(
            scale, zero, sums, rows=n, bits=bits, multiplier=multiplier,
            group_size=in_features // groups,
        )  # fmt: skip
    return SlicedWeight(
        fields=tuple(fields),
        field_bits=widths,
        scale=scale.float() / 2 if half_step else scale,
        zero_point=zero,
        zero_codes=_pad_rows(zero_point, np_rows),
        sums=sums,
        terms=zero_terms(
            scale, zero, sums, multiplier=multiplier, group_size=in_features // groups
        ),
        in_features=in_features,
        out_features=n,
        columns=columns,
        bits=bits,
        multiplier=multiplier,
        group_rows=group_rows,
    )


def unslice_codes(weight: SlicedWeight) -> torch.Tensor:
    """Restore the codes: uint8 ``[N, K]``."""
    np_rows, columns = weight.padded_rows, weight.columns
    codes = weight.sums.new_zeros((np_rows, columns), dtype=torch.uint8)
    shift = 0
    for field, width in zip(weight.fields, weight.field_bits, strict=True):
        mask = (1 << width) - 1
        parts = [(field >> (width * i)) & mask for i in range(BYTE_BITS // width)]
        # [kb, nb, run, i, row, j] -> [nb, row, kb, run, i, j]
        ordered = torch.stack(parts, 3).permute(1, 4, 0, 2, 3, 5)
        codes |= ordered.reshape(np_rows, columns) << shift
        shift += width
    codes = codes[: weight.out_features, : weight.in_features].contiguous()
    return codes ^ BYTE_SHIFT if weight.bits == BYTE_BITS else codes


def shard_rows(stored: StoredWeight, start: int, stop: int) -> StoredWeight:
    """Keep the outputs ``start`` to ``stop`` of a stored weight.

    Raises:
        ValueError: if the weight has no such rows.
    """
    if not 0 <= start < stop <= stored.packed.shape[1]:
        raise ValueError(f"rows {start} to {stop} are none of {stored.packed.shape[1]}")
    return StoredWeight(
        packed=stored.packed[:, start:stop].contiguous(),
        scale=stored.scale[start:stop].contiguous(),
        zero_point=stored.zero_point[start:stop].contiguous(),
        in_features=stored.in_features,
    )


def shard_columns(stored: StoredWeight, start: int, stop: int) -> StoredWeight:
    """Keep the inputs ``start`` to ``stop`` of a stored weight: whole words and whole groups.

    Raises:
        ValueError: if a border cuts a word of 32 columns or a scale group.
    """
    k, groups = stored.in_features, stored.scale.shape[1]
    step = WORD_BITS if groups == 1 else k // groups
    if not 0 <= start < stop <= k or start % step or (stop % step and stop != k):
        raise ValueError(f"columns {start} to {stop} of {k} are no whole blocks of {step}")
    kept = slice(None) if groups == 1 else slice(start // step, stop // step)
    return StoredWeight(
        packed=stored.packed[:, :, start // WORD_BITS : -(-stop // WORD_BITS)].contiguous(),
        scale=stored.scale[:, kept].contiguous(),
        zero_point=stored.zero_point[:, kept].contiguous(),
        in_features=stop - start,
    )


def _write_fields(fields: list[torch.Tensor], codes: torch.Tensor, blocks: slice) -> None:
    """Cut the codes ``[R, K]`` of whole blocks of rows into their place in every field."""
    n, k = codes.shape
    row_blocks = blocks.stop - blocks.start
    kb, _, _, bn, g = fields[0].shape
    padded = codes.new_zeros(row_blocks * bn, kb * BYTE_BITS * g)
    # flipping the top bit of a byte is subtracting 128
    padded[:n, :k] = codes ^ BYTE_SHIFT if fields[0].shape[2] == BYTE_BITS else codes
    shift = 0
    for field in fields:
        width = field.shape[2]
        parts = padded.view(row_blocks, bn, kb, width, BYTE_BITS // width, g)
        out = field[:, blocks].permute(1, 3, 0, 2, 4)
        mask = (1 << width) - 1
        for i in range(BYTE_BITS // width):
            part = ((parts[..., i, :] >> shift) & mask) << (width * i)
            if i:
                out |= part
            else:
                out.copy_(part)
        shift += width


def _row_chunks(n: int, block_rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_CODES // (columns * block_rows)) * block_rows
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step


def _pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    padded = tensor.new_zeros((rows, tensor.shape[1]))
    padded[: tensor.shape[0]] = tensor
    return padded


def _check_stored(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, in_features: int
) -> None:
    n, groups = scale.shape
    if packed.dim() != 3 or packed.shape[1] != n or zero_point.shape != scale.shape:
        raise ValueError(
            f"packed {tuple(packed.shape)}, scale {tuple(scale.shape)} and zero_point"
            f" {tuple(zero_point.shape)} do not make a weight"
        )
    if packed.shape[2] != _padded(in_features, WORD_BITS) // WORD_BITS:
        raise ValueError(f"{packed.shape[2]} words do not hold K = {in_features}")
    if in_features % groups:
        raise ValueError(f"{groups} groups do not divide K = {in_features}")


def _check_layout(slice_bytes: int, block_rows: int, in_features: int, groups: int) -> None:
    if slice_bytes not in SLICE_BYTES or block_rows not in BLOCK_ROWS:
        raise ValueError(
            f"slice_bytes {slice_bytes} is none of {SLICE_BYTES}"
            f" or block_rows {block_rows} none of {BLOCK_ROWS}"
        )
    if groups > 1 and (in_features // groups) % slice_bytes:
        raise ValueError(
            f"slice_bytes {slice_bytes} do not divide a group of {in_features // groups} columns"
        )


def _check_range(zero: torch.Tensor, bits: int, multiplier: int, group_size: int) -> None:
    """Hold ``max |w - z| max x K`` of every row and group within int32."""
    low = -BYTE_SHIFT if bits == BYTE_BITS else 0
    high = low + (1 << bits) - 1
    reach = torch.maximum((zero - multiplier * low).abs(), (multiplier * high - zero).abs())
    if int(reach.max()) * MAX_ACTIVATION_CODE * group_size >= INT32_END:
        raise ValueError(
            f"{group_size} columns at {bits} bits with zero-points {int(reach.max())} away"
            " overflow int32; use smaller groups"
        )

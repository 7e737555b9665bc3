"""The stored weight layout: bit-planes of unsigned codes.

    packed[b, n, w] bit j  =  bit b of codes[n, 32 * w + j]

Every plane costs one bit a weight, so codes of 3 bits cost 3 bits. Columns beyond K are zero.

Shape legend: P planes, N rows, K columns, W = ceil(K / 32) words.
"""

import torch

__all__ = ["WORD_BITS", "pack_codes", "packed_words", "unpack_codes"]

WORD_BITS = 32
BYTE_BITS = 8


def packed_words(in_features: int) -> int:
    """Words that hold one plane of one row."""
    return -(-in_features // WORD_BITS)


def pack_codes(codes_NK: torch.Tensor, planes: int) -> torch.Tensor:
    """Cut codes into bit-planes.

    Args:
        codes_NK: uint8 ``[N, K]``, any strides.
        planes: bits to keep of a code, 1..8.

    Returns:
        int32 ``[P, N, W]``, contiguous, on the device of the codes.

    Raises:
        ValueError: if the codes are not uint8 or one needs more planes.
    """
    _check_codes(codes_NK, planes)
    n, k = codes_NK.shape
    words = packed_words(k)
    padded = codes_NK.new_zeros(n, words * WORD_BITS)
    padded[:, :k] = codes_NK
    bits_NBJ = padded.view(n, words * WORD_BITS // BYTE_BITS, BYTE_BITS)
    packed_PNB = codes_NK.new_zeros(planes, n, bits_NBJ.shape[1])
    for plane in range(planes):
        for position in range(BYTE_BITS):
            packed_PNB[plane] |= ((bits_NBJ[..., position] >> plane) & 1) << position
    # four bytes are one word: every supported machine is little-endian
    return packed_PNB.view(torch.int32)


def unpack_codes(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Restore the codes of `pack_codes`.

    Args:
        packed: int32 ``[P, N, W]``.
        in_features: K.

    Returns:
        uint8 ``[N, K]``, contiguous.

    Raises:
        ValueError: if the words do not fit K.
    """
    planes, n, words = packed.shape
    if packed.dtype != torch.int32 or words != packed_words(in_features) or planes > BYTE_BITS:
        raise ValueError(
            f"{packed.dtype} {tuple(packed.shape)} are no bit-planes of {in_features} columns;"
            f" int32 [planes, rows, {packed_words(in_features)}] are"
        )
    packed_PNB = packed.contiguous().view(torch.uint8)
    codes_NBJ = packed_PNB.new_zeros(n, packed_PNB.shape[2], BYTE_BITS)
    for position in range(BYTE_BITS):
        for plane in range(planes):
            codes_NBJ[..., position] |= ((packed_PNB[plane] >> position) & 1) << plane
    return codes_NBJ.view(n, words * WORD_BITS)[:, :in_features].contiguous()


def _check_codes(codes_NK: torch.Tensor, planes: int) -> None:
    if codes_NK.dtype != torch.uint8 or codes_NK.dim() != 2:
        raise ValueError(f"codes must be uint8 [N, K], got {codes_NK.dtype} {codes_NK.dim()}-d")
    if not 1 <= planes <= BYTE_BITS:
        raise ValueError(f"planes must be 1 to {BYTE_BITS}, got {planes}")
    if codes_NK.numel() and int(codes_NK.max()) >> planes:
        raise ValueError(f"code {int(codes_NK.max())} does not fit {planes} planes")

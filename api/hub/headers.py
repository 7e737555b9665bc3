"""The header of a safetensors file, read with distrust: a stranger wrote it.

A file is 8 bytes with the length n of the header (little-endian), n bytes of JSON, and the data.
The JSON maps each tensor name to `dtype`, `shape` and `data_offsets` into the data.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api.errors import UnsupportedFormat
from api.hub.base import TensorHeader

__all__ = ["LENGTH_BYTES", "parse_header", "parse_length"]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
NAME = re.compile(r"[\w.\-]{1,256}", re.ASCII)
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


def parse_length(first: bytes, file_bytes: int, path: str) -> int:
    """Read the header's length from a file's first bytes.

    Raises:
        UnsupportedFormat: if this cannot be a safetensors file of `file_bytes` bytes.
    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) <= LENGTH_BYTES or first[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        raise _malformed(path, "it does not start like a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise _malformed(path, f"its header has {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        raise _malformed(path, "its header is longer than the file")
    return length


def parse_header(raw: bytes, data_bytes: int, path: str) -> dict[str, TensorHeader]:
    """Read the tensors of a header and check that they tile the data exactly.

    Args:
        raw: the JSON, without the length.
        data_bytes: what follows the header in the file.
        path: the file's name, for messages.

    Raises:
        UnsupportedFormat: naming the file and what is wrong with it.
    """
    entries = _load_entries(raw, path)
    spans = {name: _read_span(name, entry, path) for name, entry in entries.items()}
    end = 0
    for span in sorted(spans.values(), key=lambda each: (each.begin, each.end)):
        if span.begin != end:
            raise _malformed(path, "its tensors overlap or leave gaps")
        end = span.end
    if end != data_bytes:
        raise _malformed(path, f"its tensors take {end} bytes, the file holds {data_bytes}")
    return {name: span.header for name, span in spans.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    header: TensorHeader
    begin: int
    end: int


def _load_entries(raw: bytes, path: str) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, "its header is no JSON") from error
    if not isinstance(record, dict):
        raise _malformed(path, "its header is no JSON object")
    record.pop("__metadata__", None)
    if not 0 < len(record) <= MAX_TENSORS:
        raise _malformed(path, f"it lists {len(record)} tensors; 1 to {MAX_TENSORS} are read")
    return record


def _read_span(name: str, entry: object, path: str) -> _Span:
    if not NAME.fullmatch(name) or not isinstance(entry, Mapping):
        raise _malformed(path, f"tensor {name[:80]!r} is not named or described properly")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    sizes, ends = _whole_numbers(shape), _whole_numbers(offsets)
    is_known = isinstance(dtype, str) and dtype in DTYPE_BYTES
    if not is_known or sizes is None or ends is None or len(ends) != 2:
        raise _malformed(path, f"tensor {name!r} has no valid dtype, shape and data_offsets")
    header = TensorHeader(dtype=str(dtype), shape=sizes)
    begin, end = ends
    if end - begin != header.elements * DTYPE_BYTES[header.dtype]:
        raise _malformed(path, f"the offsets of tensor {name!r} do not match its shape")
    return _Span(header=header, begin=begin, end=end)


def _whole_numbers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    # bool is an int in Python, and True is no size
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return None
    return tuple(value) if all(each >= 0 for each in value) else None


def _malformed(path: str, what: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"{path} cannot be read: {what}", param="model")

"""What a safetensors header must be before anything believes it."""

import json

import pytest

from api.errors import UnsupportedFormat
from api.hub.base import TensorHeader
from api.hub.headers import parse_header, parse_length


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def parse(record, data_bytes=24):
    raw = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parse_header(raw, data_bytes, "model.safetensors")


def test_tensors_that_tile_the_data_are_read():
    tensors = parse(
        {
            "__metadata__": {"format": "pt"},
            "b.weight": entry("BF16", (4,), (16, 24)),
            "a.weight": entry("F32", (2, 2), (0, 16)),
            "empty": entry("F32", (0, 5), (16, 16)),
        }
    )

    assert tensors == {
        "a.weight": TensorHeader(dtype="F32", shape=(2, 2)),
        "b.weight": TensorHeader(dtype="BF16", shape=(4,)),
        "empty": TensorHeader(dtype="F32", shape=(0, 5)),
    }


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        ({}, "lists 0 tensors"),
        ({"__metadata__": {}}, "lists 0 tensors"),
        ({"a": entry(offsets=(0, 20))}, "do not match its shape"),
        ({"a": entry(shape=(2, 2))}, "do not match its shape"),
        ({"a": entry(offsets=(24, 0))}, "do not match its shape"),
        ({"a": entry(shape=(10**30, 10**30))}, "do not match its shape"),
        ({"a": entry(offsets=(0, 24)), "b": entry(offsets=(0, 24))}, "overlap or leave gaps"),
        ({"a": entry("U8", (4,), (0, 4)), "b": entry("U8", (18,), (6, 24))}, "overlap"),
        ({"a": entry("U8", (20,), (0, 20))}, "take 20 bytes, the file holds 24"),
        ({"a": entry("U8", (30,), (0, 30))}, "take 30 bytes, the file holds 24"),
        ({"a": entry("F12")}, "no valid dtype"),
        ({"a": entry(dtype=["F32"])}, "no valid dtype"),
        ({"a": entry(shape=(-2, -3))}, "no valid dtype"),
        ({"a": entry(shape=(True, 6))}, "no valid dtype"),
        ({"a": entry(shape=(2.0, 3))}, "no valid dtype"),
        ({"a": entry(shape=(1,) * 9)}, "no valid dtype"),
        ({"a": entry(offsets=(0, 12, 24))}, "no valid dtype"),
        ({"a": {}}, "no valid dtype"),
        ({"a": 1}, "not named or described"),
        ({"../a": entry()}, "not named or described"),
        ({"a b": entry()}, "not named or described"),
        ({"": entry()}, "not named or described"),
        ({"a" * 257: entry()}, "not named or described"),
    ],
)
def test_a_malformed_header_is_refused_with_its_fault(record, what):
    with pytest.raises(UnsupportedFormat, match=what) as refusal:
        parse(record)

    assert refusal.value.param == "model"
    assert "model.safetensors" in refusal.value.message


@pytest.mark.parametrize(
    ("first", "file_bytes", "what"),
    [
        (b"", 0, "does not start"),
        (b"\x01\0\0\0\0\0\0\0", 8, "does not start"),
        (b"\x80\x04\x95\0\0\0\0\0\0\0", 100, "does not start"),
        ((100).to_bytes(8, "little") + b"{", 50, "longer than the file"),
        ((25_000_001).to_bytes(8, "little") + b"{", 10**12, "the limit is 25000000"),
        (b"\xff" * 8 + b"{", 10**12, "the limit is 25000000"),
    ],
)
def test_a_length_that_cannot_be_is_refused(first, file_bytes, what):
    with pytest.raises(UnsupportedFormat, match=what):
        parse_length(first, file_bytes, "model.safetensors")


def test_a_length_within_the_file_is_read():
    assert parse_length((42).to_bytes(8, "little") + b"{}", 50, "model.safetensors") == 42

import json
from dataclasses import replace

import pytest

from kernels.tables import (
    BUCKETS,
    CONFIGS,
    ConfigTable,
    InvalidTableError,
    Route,
    TableEntry,
    TableKey,
    load_table,
    read_table,
    table_path,
    write_table,
)

GPU = "NVIDIA H100 80GB HBM3"


def key(w_bits=2, m=1, n=4096, k=4096, group=-1, a_bits=8):
    return TableKey.of(a_bits=a_bits, w_bits=w_bits, group=group, n=n, k=k, m=m)


def entry(key, route=Route.DECODE, **config):
    return TableEntry(key=key, route=route, us=3.5, config=config)


def table(*entries):
    return ConfigTable(gpu=GPU, entries={each.key: each for each in entries})


@pytest.mark.parametrize(
    ("m", "bucket"),
    [(1, 1), (2, 2), (3, 4), (9, 16), (64, 64), (65, 128), (2048, 2048), (9000, 2048)],
)
def test_tokens_fall_into_the_bucket_that_holds_them(m, bucket):
    assert key(m=m).m == bucket


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = table_path(GPU, tmp_path / "configs")
    few, many = entry(key(), rows=8, pdl=True, max_registers=None), entry(key(m=64), Route.TILE)
    written = replace(table(few, many), source={"commit": "abc"})

    write_table(path, written)
    read = load_table(GPU, tmp_path / "configs")

    assert path.name == "nvidia-h100-80gb-hbm3.json"
    assert (read.gpu, read.source, read.entries) == (GPU, {"commit": "abc"}, written.entries)


def test_a_gpu_with_the_same_multiprocessors_takes_the_table_until_it_has_its_own(tmp_path):
    theirs, own = entry(key(), rows=8), entry(key(), rows=4)
    write_table(table_path(GPU, tmp_path), table(theirs))
    borrowed = load_table("NVIDIA H200", tmp_path)

    write_table(table_path("NVIDIA H200", tmp_path), replace(table(own), gpu="NVIDIA H200"))
    load_table.cache_clear()
    measured = load_table("NVIDIA H200", tmp_path)

    assert borrowed.entries == {key(): theirs}
    assert measured.entries == {key(): own}


def test_a_measured_shape_gets_its_own_entry():
    own, other = entry(key(n=22016), rows=4), entry(key(), rows=8)

    assert table(other, own).lookup(key(n=22016)) is own


def test_another_shape_gets_the_entry_nearest_in_size():
    small, large = entry(key()), entry(key(n=22016))

    assert table(small, large).lookup(key(n=28672)) is large
    assert table(small, large).lookup(key(n=6144)) is small


def test_a_weight_sixteen_times_as_large_says_nothing():
    measured = entry(key(n=4096, k=4096))

    assert table(measured).lookup(key(n=1024, k=1024)) is measured
    assert table(measured).lookup(key(n=1024, k=960)) is None
    assert table(measured).lookup(key(n=65536, k=4160)) is None


def test_the_width_counts_before_the_size():
    same_width, same_size = entry(key(w_bits=3)), entry(key(w_bits=4, n=22016))

    assert table(same_width, same_size).lookup(key(w_bits=3, n=22016)) is same_width


def test_a_width_without_entries_takes_the_next_wider_and_never_a_narrower():
    narrow, wide, widest = (entry(key(w_bits=bits)) for bits in (3, 5, 8))

    assert table(narrow, wide, widest).lookup(key(w_bits=4)) is wide
    assert table(narrow).lookup(key(w_bits=4)) is None


def test_entries_of_routes_that_cannot_answer_are_passed_over():
    byte, binary = entry(key(m=2048)), entry(key(m=2048, a_bits=2), Route.BINARY)

    asked = key(m=2048, a_bits=2)
    assert table(byte, binary).lookup(asked, {Route.DECODE, Route.TILE}) is byte


@pytest.mark.parametrize("asked", [key(m=2), key(group=128), key(a_bits=16)])
def test_other_tokens_groups_or_activations_get_no_answer(asked):
    assert table(entry(key())).lookup(asked) is None


def test_narrow_activations_take_the_entry_of_eight_bits():
    byte = entry(key(), Route.DECODE)

    assert table(byte).lookup(key(a_bits=4)) is byte


def test_an_entry_of_narrow_activations_holds_for_its_own_width_alone():
    byte, binary = entry(key(m=2048)), entry(key(m=2048, a_bits=2), Route.BINARY)

    assert table(byte, binary).lookup(key(m=2048, a_bits=2)) is binary
    assert table(byte, binary).lookup(key(m=2048, a_bits=2, n=8192)) is binary
    assert table(byte, binary).lookup(key(m=2048, a_bits=2, w_bits=1)) is byte


def test_the_order_of_a_file_decides_nothing():
    wide, tall = entry(key(n=8192)), entry(key(k=8192))

    asked = key(n=16384)
    assert table(wide, tall).lookup(asked) is table(tall, wide).lookup(asked)


def test_a_gpu_that_was_never_measured_has_an_empty_table(tmp_path):
    assert load_table("Some Other GPU", tmp_path).lookup(key()) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a8 w2 4096x4096 m1", {}, "no key"),
        ("a8 w9 g-1 4096x4096 m1", {}, "w_bits 9"),
        ("a9 w2 g-1 4096x4096 m1", {}, "a_bits 9"),
        ("a8 w2 g48 4096x4096 m1", {}, "group 48"),
        ("a8 w2 g-1 4096x4096 m3", {}, "m 3"),
        ("a8 w2 g-1 0x4096 m1", {}, "0x4096"),
        ("a8 w2 g-1 4096x4096 m1", {"route": "decode"}, "a8 w2 g-1 4096x4096 m1: its fields"),
        ("a8 w2 g-1 4096x4096 m1", {"route": "x", "us": 1, "config": {}}, "m1: route 'x'"),
        ("a8 w2 g-1 4096x4096 m1", {"route": "tile", "us": 0, "config": {}}, "m1: us 0"),
        ("a8 w2 g-1 4096x4096 m1", {"route": "tile", "us": 1, "config": {"a": 1.5}}, "m1: config"),
    ],
)
def test_a_wrong_entry_is_refused_by_file_and_key(tmp_path, name, value, message):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"gpu": GPU, "source": {}, "entries": {name: value}}))

    with pytest.raises(InvalidTableError, match=rf"^gpu\.json: .*{message}"):
        read_table(path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"gpu": "x"}', '{"gpu": "x", "source": {}, "entries": {"a": 1, "a": 2}}'],
)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)

    with pytest.raises(InvalidTableError, match=r"^gpu\.json: "):
        read_table(path)


def test_shipped_tables_are_valid_and_named_after_their_gpus():
    paths = sorted(CONFIGS.glob("*.json"))

    assert [table_path(read_table(path).gpu) for path in paths] == paths


def test_buckets_rise():
    assert list(BUCKETS) == sorted(set(BUCKETS))

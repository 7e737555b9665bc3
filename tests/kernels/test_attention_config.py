import json
from dataclasses import replace

import pytest

from kernels.attention_config import (
    ATTENTION_CONFIGS,
    AttentionKey,
    AttentionTable,
    LaunchConfig,
    load_attention_table,
    read_attention_table,
    select_config,
    write_attention_table,
)
from kernels.kv_pages import KvPages
from kernels.tables import InvalidTableError, table_path

GPU = "NVIDIA H100 80GB HBM3"
SHORT = AttentionKey(kv_heads=8, group=4, head_dim=128, bits=8, tokens=2048)
LONG = replace(SHORT, tokens=32768)
CONFIG = LaunchConfig(splits=8, min_chunk=256, block_t=128, num_warps=4, num_stages=2)


def table():
    return AttentionTable(gpu=GPU, entries={SHORT: CONFIG, LONG: replace(CONFIG, splits=16)})


def test_a_table_of_launches_is_read_as_it_was_written(tmp_path):
    path = table_path(GPU, tmp_path)

    write_attention_table(path, table())
    read = load_attention_table(GPU, tmp_path)

    assert (read.gpu, read.entries) == (GPU, table().entries)


@pytest.mark.parametrize(("tokens", "splits"), [(1, 8), (2048, 8), (8192, 8), (16384, 16)])
def test_a_context_that_was_not_measured_takes_the_nearest(tokens, splits):
    pages = KvPages.allocate(1, 8, 128, bits=8)

    chosen = select_config(pages, tokens, group=4, table=table())

    assert chosen.splits == splits


def test_another_shape_than_those_measured_gets_what_is_computed():
    pages = KvPages.allocate(1, 8, 128, bits=8)

    computed = select_config(pages, 2048, group=4)

    assert select_config(pages, 2048, group=2, table=table()) == computed


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"h8 kv8": {}}, "is no key"),
        ({"h8 g4 d128 kv8 t64": {"splits": 2}}, "need"),
        ({"h8 g4 d128 kv8 t64": {"splits": 0}}, "positive integers"),
        (None, "its fields must be"),
    ],
)
def test_a_wrong_table_of_launches_is_refused_by_name(tmp_path, entries, message):
    path = tmp_path / "gpu.json"
    write_attention_table(path, table())
    record = json.loads(path.read_text())
    whole = dict(next(iter(record["entries"].values())))
    if entries and message == "positive integers":
        entries = {key: whole | config for key, config in entries.items()}
    path.write_text(json.dumps({**record, "entries": entries} if entries else {}))

    with pytest.raises(InvalidTableError, match=f"gpu.json: .*{message}"):
        read_attention_table(path)


def test_shipped_launches_of_attention_can_be_read():
    for path in sorted(ATTENTION_CONFIGS.glob("*.json")):
        assert table_path(read_attention_table(path).gpu, ATTENTION_CONFIGS) == path

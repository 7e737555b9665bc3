"""Data sets for the fake Hub: the files that WikiText-2, C4 and Penn Treebank are read from."""

import gzip
import io
import json

import pyarrow as pa
from pyarrow import parquet

from api.hub.base import TextUse
from api.hub.datasets import HUB_TEXTS
from engine.datasets import TextName

SENTENCE = "the quick brown fox jumps over the lazy dog and runs away"


def parquet_file(rows, column="text"):
    """A parquet file of one column of texts and one of numbers."""
    content = io.BytesIO()
    parquet.write_table(pa.table({column: rows, "number": list(range(len(rows)))}), content)
    return content.getvalue()


def gzip_lines(documents):
    """A gzipped file of JSON lines."""
    lines = "".join(json.dumps({"text": each, "url": "x"}) + "\n" for each in documents)
    return gzip.compress(lines.encode())


def add_texts(fake_hub, *, documents=None):
    """Put all three at the revisions that the service pins; return the rows of each file."""
    rows = {}
    for name, wanted in HUB_TEXTS.items():
        files = {"README.md": b"data"}
        for use in TextUse:
            texts = [f"{name} {use} {i}: {SENTENCE}" for i in range(40)]
            if name is TextName.C4:
                texts = documents or texts
                files[wanted.paths[use]] = gzip_lines(texts)
            else:
                files[wanted.paths[use]] = parquet_file(texts, wanted.column)
            rows[name, use] = texts
        repository = fake_hub.add(f"datasets/{wanted.repo_id}", files)
        # a later commit, which nobody asked for
        pinned = repository.head
        repository.commit({"README.md": b"moved on"})
        (repository.branches if "/" in wanted.revision else repository.tags)[wanted.revision] = (
            pinned
        )
    return rows

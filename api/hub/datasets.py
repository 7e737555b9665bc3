"""Texts that come from data sets of the Hub: one file each, at a pinned revision.

Rows are joined as the GPTQ protocol does it, so that perplexities can be compared with published
ones: WikiText-2 with an empty line between rows, C4 and Penn Treebank with a space. Of C4 only
the start of one shard is read, as it comes.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from huggingface_hub.hf_api import RepoFile
from typing_extensions import override

from api.errors import HubUnavailable, ServiceError
from api.hub.base import RemoteFile, ResolvedModel, TextSource, TextUse
from api.hub.connection import HubConnection
from api.hub.transfer import matches_content
from engine.datasets import TextName
from engine.errors import DatasetUnavailable

__all__ = ["HubTexts"]

COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_PARQUET_BYTES = 64 << 20
CHARACTERS: Mapping[TextUse, int] = {TextUse.CALIBRATION: 8_000_000, TextUse.EVALUATION: 4_000_000}
"""Of C4. 256 windows of 2048 tokens, as much as anyone evaluates on, are some 2.3 million."""
GZIP_WINDOW = 31  # what zlib calls a gzip header with the largest window


@dataclass(frozen=True, slots=True, kw_only=True)
class HubText:
    """Where a text is on the Hub."""

    repo_id: str
    revision: str
    """A commit, or a branch that is resolved when it is read."""
    paths: Mapping[TextUse, str]
    column: str
    separator: str


HUB_TEXTS: Mapping[TextName, HubText] = {
    TextName.WIKITEXT2: HubText(
        repo_id="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        paths={
            TextUse.CALIBRATION: "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            TextUse.EVALUATION: "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
        column="text",
        separator="\n\n",
    ),
    TextName.C4: HubText(
        repo_id="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        paths={
            TextUse.CALIBRATION: "en/c4-train.00000-of-01024.json.gz",
            TextUse.EVALUATION: "en/c4-validation.00000-of-00008.json.gz",
        },
        column="text",
        separator=" ",
    ),
    TextName.PTB: HubText(
        repo_id="ptb-text-only/ptb_text_only",
        # the repository itself holds a script; the Hub keeps this export of what it gave
        revision="refs/convert/parquet",
        paths={
            TextUse.CALIBRATION: "penn_treebank/train/0000.parquet",
            TextUse.EVALUATION: "penn_treebank/test/0000.parquet",
        },
        column="sentence",
        separator=" ",
    ),
}


class HubTexts(TextSource):
    """Reads texts through one connection."""

    def __init__(self, connection: HubConnection) -> None:
        self._connection = connection

    @override
    def fetch(self, name: TextName, use: TextUse, path: Path, check: Callable[[], None]) -> None:
        """Write a text of the Hub to `path`, whole or not at all."""
        wanted = HUB_TEXTS[name]
        try:
            content = self._read(wanted, use, check)
        except HubUnavailable:
            raise
        except (ServiceError, DatasetUnavailable) as error:
            raise DatasetUnavailable(
                f"{name} cannot be read from {wanted.repo_id}: {error.message}"
            ) from error
        partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(content, encoding="utf-8", newline="\n")
        partial.replace(path)

    def _read(self, wanted: HubText, use: TextUse, check: Callable[[], None]) -> str:
        resolved = self._resolve(wanted)
        path = wanted.paths[use]
        if path.endswith(".parquet"):
            rows = read_parquet(self._read_whole(resolved, path), wanted.column)
            return wanted.separator.join(rows)
        return self._connection.call(
            lambda: self._read_start(resolved, path, wanted, CHARACTERS[use], check),
            self._connection.new_patience(check),
        )

    def _resolve(self, wanted: HubText) -> ResolvedModel:
        sha = wanted.revision
        if not COMMIT.fullmatch(sha):
            connection = self._connection
            info = connection.call(
                lambda: connection.api.dataset_info(
                    wanted.repo_id, revision=wanted.revision, timeout=connection.timeout_s
                )
            )
            if info.sha is None:
                raise HubUnavailable("The Hub named no revision.")
            sha = info.sha
        return ResolvedModel(model=wanted.repo_id, sha=sha, files=(), repo_type="dataset")

    def _read_whole(self, resolved: ResolvedModel, path: str) -> bytes:
        connection = self._connection
        found = connection.call(
            lambda: connection.api.get_paths_info(
                resolved.model, path, revision=resolved.sha, repo_type="dataset"
            )
        )
        file = next((each for each in found if isinstance(each, RepoFile)), None)
        if file is None:
            raise DatasetUnavailable(f"it holds no {path}")
        if file.size > MAX_PARQUET_BYTES:
            raise DatasetUnavailable(f"{path} is larger than {MAX_PARQUET_BYTES} bytes")
        content = connection.read(resolved, path, 0, file.size)
        announced = RemoteFile(
            path=path,
            bytes=file.size,
            sha256=None if file.lfs is None else file.lfs.sha256,
            git_sha1=file.blob_id if file.lfs is None else None,
        )
        if not matches_content(content, announced):
            raise HubUnavailable(f"{path} did not arrive as the Hub announced it.")
        return content

    def _read_start(
        self,
        resolved: ResolvedModel,
        path: str,
        wanted: HubText,
        characters: int,
        check: Callable[[], None],
    ) -> str:
        documents: list[str] = []
        missing = characters
        with self._connection.stream(resolved, path, 0) as (_, chunks):
            for document in read_documents(_checked(chunks, check), wanted.column):
                documents.append(document)
                missing -= len(document)
                if missing <= 0:
                    break
        if not documents:
            raise DatasetUnavailable("its file is empty")
        return wanted.separator.join(documents)


def read_parquet(content: bytes, column: str) -> list[str]:
    """The texts of one column of a parquet file.

    Raises:
        DatasetUnavailable: if pyarrow is not installed, or the file is no such table.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415  # an optional package of tens of megabytes
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise DatasetUnavailable(
            "it is a parquet file, and pyarrow is not installed; install the extra `texts`"
        ) from error
    try:
        table = parquet.read_table(BytesIO(content), columns=[column])
    except (pa.ArrowException, OSError) as error:
        raise DatasetUnavailable("its file is no readable parquet") from error
    if table.num_columns != 1:
        raise DatasetUnavailable(f"its file has no column {column}")
    return [str(row) for row in table.column(0).to_pylist()]


def read_documents(chunks: Iterable[bytes], column: str) -> Iterator[str]:
    """The texts of gzipped lines of JSON, as they come.

    Raises:
        DatasetUnavailable: if the bytes are not that.
    """
    unzip, rest = zlib.decompressobj(GZIP_WINDOW), b""
    try:
        for chunk in chunks:
            *lines, rest = (rest + unzip.decompress(chunk)).split(b"\n")
            yield from (str(json.loads(line)[column]) for line in lines)
        if rest:
            yield str(json.loads(rest)[column])
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise DatasetUnavailable("its file is no gzip of JSON lines") from error


def _checked(chunks: Iterator[bytes], check: Callable[[], None]) -> Iterator[bytes]:
    for chunk in chunks:
        check()
        yield chunk

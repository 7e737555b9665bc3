"""Reads a model's facts through bounded reads: config, index, and the header of each shard."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from api.errors import ConfigRejected, UnsupportedFormat
from api.hub.base import ModelFacts, RemoteFile, ResolvedModel, TensorHeader
from api.hub.contents import (
    INDEX_FILE,
    MAX_JSON_BYTES,
    parse_json_object,
    select_small_files,
    select_weight_files,
)
from api.hub.headers import LENGTH_BYTES, parse_header, parse_length
from engine.architecture import Architecture, check_config
from engine.errors import UnsupportedModel

__all__ = ["ReadRange", "inspect_model"]

FIRST_READ_BYTES = 100_000
"""Holds the whole header of most shards, so that one request does."""
# an index names every tensor of the model once
MAX_INDEX_BYTES = 25_000_000
# a model of a thousand billion parameters stays below half of it
MAX_HEADERS_BYTES = 50_000_000
PARALLEL_READS = 8
MAX_MESSAGE = 500


class ReadRange(Protocol):
    """Reads bytes of one file of a model."""

    def __call__(self, path: str, start: int, length: int) -> bytes:
        """Return bytes `start` to `start + length`, fewer at the end of the file."""


def inspect_model(resolved: ResolvedModel, read: ReadRange) -> ModelFacts:
    """Collect the facts of a model, cheapest refusal first.

    Raises:
        UnsupportedFormat: about the weights.
        ConfigRejected: about the config or the tokenizer.
    """
    small = select_small_files(resolved)
    if resolved.find_file(INDEX_FILE) is None:
        # a repository with pickles only is told so, whatever its config says
        select_weight_files(resolved, None)
    config = _read_config(resolved, read)
    architecture = _read_architecture(config)
    _check_tokenizer(resolved, read)
    index = _read_index(resolved, read)
    shards = select_weight_files(resolved, index)
    headers = _read_headers(shards, read)
    return ModelFacts(
        config=config,
        architecture=architecture,
        tensors=_merge_headers(headers, index),
        weight_files=shards,
        fetched_files=(*small, *shards),
    )


def _read_config(resolved: ResolvedModel, read: ReadRange) -> dict[str, Any]:
    if resolved.find_file("config.json") is None:
        raise ConfigRejected("The model has no config.json.", param="model")
    return parse_json_object(read("config.json", 0, MAX_JSON_BYTES + 1), "config.json")


def _read_architecture(config: Mapping[str, Any]) -> Architecture:
    try:
        return check_config(config)
    except UnsupportedModel as error:
        # the message quotes the value, and a value may be as long as the config
        message = error.message[:MAX_MESSAGE]
        raise ConfigRejected(message, param="model", config_field=error.field) from error


def _check_tokenizer(resolved: ResolvedModel, read: ReadRange) -> None:
    if resolved.find_file("tokenizer.json") is None:
        raise ConfigRejected(
            "The model has no tokenizer.json; save its fast tokenizer with save_pretrained.",
            param="model",
        )
    name = "tokenizer_config.json"
    if resolved.find_file(name) is None:
        return
    if "auto_map" in parse_json_object(read(name, 0, MAX_JSON_BYTES + 1), name):
        raise ConfigRejected(
            f"auto_map in {name} asks for code from the repository; only built-in classes run.",
            param="model",
        )


def _read_index(resolved: ResolvedModel, read: ReadRange) -> dict[str, Any] | None:
    file = resolved.find_file(INDEX_FILE)
    if file is None:
        return None
    if file.bytes > MAX_INDEX_BYTES:
        raise UnsupportedFormat(
            f"{INDEX_FILE} has {file.bytes} bytes, the limit is {MAX_INDEX_BYTES}", param="model"
        )
    return parse_json_object(
        read(INDEX_FILE, 0, MAX_INDEX_BYTES + 1), INDEX_FILE, max_bytes=MAX_INDEX_BYTES
    )


def _read_headers(
    shards: tuple[RemoteFile, ...], read: ReadRange
) -> dict[str, dict[str, TensorHeader]]:
    with ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="header") as pool:
        beginnings = tuple(pool.map(lambda shard: _read_beginning(shard, read), shards))
        # each header may be long, but not all of them
        total = sum(each.header_bytes for each in beginnings)
        if total > MAX_HEADERS_BYTES:
            raise UnsupportedFormat(
                f"the headers of the shards have {total} bytes, the limit is {MAX_HEADERS_BYTES}",
                param="model",
            )
        headers = pool.map(lambda each: _read_header(each, read), beginnings)
        return {shard.path: header for shard, header in zip(shards, headers, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beginning:
    shard: RemoteFile
    content: bytes
    header_bytes: int


def _read_beginning(shard: RemoteFile, read: ReadRange) -> _Beginning:
    content = read(shard.path, 0, min(FIRST_READ_BYTES, shard.bytes))
    length = parse_length(content, shard.bytes, shard.path)
    return _Beginning(shard=shard, content=content, header_bytes=length)


def _read_header(beginning: _Beginning, read: ReadRange) -> dict[str, TensorHeader]:
    shard, first = beginning.shard, beginning.content
    end = LENGTH_BYTES + beginning.header_bytes
    raw = first[LENGTH_BYTES:end]
    if len(first) < end:
        raw += read(shard.path, len(first), end - len(first))
    return parse_header(raw, shard.bytes - end, shard.path)


def _merge_headers(
    headers: Mapping[str, Mapping[str, TensorHeader]], index: Mapping[str, Any] | None
) -> dict[str, TensorHeader]:
    merged: dict[str, TensorHeader] = {}
    place: dict[str, str] = {}
    for path, tensors in headers.items():
        merged.update(tensors)
        place.update(dict.fromkeys(tensors, path))
    if len(merged) != sum(len(tensors) for tensors in headers.values()):
        raise UnsupportedFormat("two shards hold a tensor of the same name", param="model")
    if index is not None and place != index["weight_map"]:
        raise UnsupportedFormat(
            f"{INDEX_FILE} and the headers of the shards name different tensors", param="model"
        )
    return merged

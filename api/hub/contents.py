"""Which files of a model are ever fetched, and how its small JSON files are read."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from api.errors import ConfigRejected, UnsupportedFormat
from api.hub.base import RemoteFile, ResolvedModel

__all__ = [
    "INDEX_FILE",
    "MAX_JSON_BYTES",
    "parse_json_object",
    "select_small_files",
    "select_weight_files",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SMALL_FILES = frozenset({
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", INDEX_FILE,
})  # fmt: skip
LICENSE_FILE = re.compile(r"(?:LICENSE|LICENCE|NOTICE)[\w.-]{0,60}", re.ASCII)
SHARD_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}\.safetensors", re.ASCII)
FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
MAX_JSON_BYTES = 1_000_000
MAX_JSON_DEPTH = 20
MAX_TOKENIZER_BYTES = 64 << 20
MAX_SHARDS = 512


def select_small_files(resolved: ResolvedModel) -> tuple[RemoteFile, ...]:
    """The allow-listed files beside the weights, all at the top of the repository.

    Raises:
        ConfigRejected: if one of them is absurdly large.
    """
    chosen = tuple(
        each
        for each in resolved.files
        if each.path in SMALL_FILES or LICENSE_FILE.fullmatch(each.path)
    )
    for each in chosen:
        if each.bytes > MAX_TOKENIZER_BYTES:
            raise _rejected(f"{each.path} has {each.bytes} bytes, more than {MAX_TOKENIZER_BYTES}")
    return chosen


def select_weight_files(
    resolved: ResolvedModel, index: Mapping[str, Any] | None
) -> tuple[RemoteFile, ...]:
    """The shards that the index names, or the one file without an index.

    A repository may hold a second copy of its weights, or others' formats; neither is fetched.

    Raises:
        UnsupportedFormat: if there are no safetensors, or the index is wrong about them.
    """
    if index is None:
        single = resolved.find_file(SINGLE_FILE)
        if single is None:
            raise UnsupportedFormat(_describe_missing(resolved.files), param="model")
        return (single,)
    names = _shard_names(index)
    shards = tuple(resolved.find_file(name) for name in names)
    found = tuple(each for each in shards if each is not None)
    if len(found) != len(names):
        absent = next(name for name, each in zip(names, shards, strict=True) if each is None)
        raise _malformed_index(f"it names {absent}, which the model does not have")
    return found


def parse_json_object(raw: bytes, path: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of bounded size and depth.

    Raises:
        ConfigRejected: naming the file and the limit.
    """
    if len(raw) > max_bytes:
        raise _rejected(f"{path} has more than {max_bytes} bytes")
    try:
        record = json.loads(raw)
    except RecursionError as error:
        raise _rejected(f"{path} is nested deeper than {MAX_JSON_DEPTH} levels") from error
    except ValueError as error:
        raise _rejected(f"{path} is no JSON") from error
    if not isinstance(record, dict):
        raise _rejected(f"{path} is no JSON object")
    _check_depth(record, path)
    return record


def _check_depth(record: dict[str, Any], path: str) -> None:
    level: list[Any] = [record]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return
    raise _rejected(f"{path} is nested deeper than {MAX_JSON_DEPTH} levels")


def _children(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return [each for each in value.values() if isinstance(each, dict | list)]
    if isinstance(value, list):
        return [each for each in value if isinstance(each, dict | list)]
    return ()


def _shard_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _malformed_index("it has no weight_map")
    for name in weight_map.values():
        # one component only: a shard is never looked for in another folder
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name) or ".." in name:
            raise _malformed_index(f"{str(name)[:100]!r} is no shard name")
    names = tuple(sorted(set(weight_map.values())))
    if len(names) > MAX_SHARDS:
        raise _malformed_index(f"it names {len(names)} shards, the limit is {MAX_SHARDS}")
    return names


def _describe_missing(files: Iterable[RemoteFile]) -> str:
    others = sorted(each.path for each in files if each.path.endswith(FOREIGN_WEIGHTS))
    held = f"only {', '.join(others[:3])}" if others else "no weights"
    return (
        f"the model has {held} and no {SINGLE_FILE}; load it where you trust it and save it with"
        " save_pretrained, which writes safetensors"
    )


def _malformed_index(what: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"{INDEX_FILE} cannot be used: {what}", param="model")


def _rejected(what: str) -> ConfigRejected:
    return ConfigRejected(what, param="model")

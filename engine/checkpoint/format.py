"""What an ABQ checkpoint directory is made of: file names, tensor names and the config section.

A directory is a Hugging Face model: `config.json` with a `quantization_config`, sharded
safetensors with an index, tokenizer files, and a manifest. A quantized linear layer `<name>` is
stored as `<name>.weight_packed`, `<name>.weight_scale`, `<name>.weight_zero_point` and, where it
has one, `<name>.bias`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.architecture import Architecture
from engine.errors import CheckpointInvalid, SpecError
from engine.orders import block_of, factors
from engine.rotation import Rotation, check_rotation, online_blocks
from engine.spec import QuantSpec

__all__ = [
    "CHECKPOINT_FORMAT",
    "CONFIG_NAME",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "PACKED_SUFFIX",
    "QUANT_METHOD",
    "QUANT_SUFFIXES",
    "TOKENIZER_FILES",
    "quantization_section",
    "rotation_of_section",
    "rotation_section",
    "shard_name",
    "spec_of_section",
]

QUANT_METHOD = "abq"
CHECKPOINT_FORMAT = "bitplane-v1"
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "abq_manifest.json"
PACKED_SUFFIX = ".weight_packed"
QUANT_SUFFIXES = (PACKED_SUFFIX, ".weight_scale", ".weight_zero_point")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Copied from the source where it has them; `generation_config.json` names the stop tokens."""
SPEC_FIELDS = (
    "w_bits", "a_bits", "q_bits", "kv_bits", "group_size", "symmetric", "bit_balance", "half_step",
    "overrides",
)  # fmt: skip


def shard_name(index: int, count: int) -> str:
    """File name of shard `index`, counted from 0, of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def quantization_section(spec: QuantSpec, not_converted: Sequence[str]) -> dict[str, Any]:
    """Write the `quantization_config` of a config.

    Args:
        spec: what was done.
        not_converted: full names of the linear layers left in full precision, `lm_head` included.
    """
    fields = spec.to_json()
    return {
        "quant_method": QUANT_METHOD,
        "checkpoint_format": CHECKPOINT_FORMAT,
        **{name: fields[name] for name in SPEC_FIELDS},
        "modules_to_not_convert": list(not_converted),
    }


def spec_of_section(config: Mapping[str, Any]) -> QuantSpec:
    """Read the bits back from a config that has a `quantization_config`.

    Raises:
        CheckpointInvalid: if the section is missing, of another method, or not possible.
    """
    section = config.get("quantization_config")
    if not isinstance(section, Mapping) or section.get("quant_method") != QUANT_METHOD:
        raise CheckpointInvalid(f"{CONFIG_NAME} has no quantization_config of method abq")
    if section.get("checkpoint_format") != CHECKPOINT_FORMAT:
        raise CheckpointInvalid(
            f"checkpoint_format {section.get('checkpoint_format')!r} is unknown;"
            f" this version reads {CHECKPOINT_FORMAT}"
        )
    try:
        return QuantSpec.from_json({name: section[name] for name in SPEC_FIELDS if name in section})
    except (SpecError, TypeError) as error:
        raise CheckpointInvalid(f"quantization_config is not possible: {error}") from error


def rotation_section(architecture: Architecture, rotation: Rotation) -> dict[str, Any]:
    """Write the `rotation` of a `quantization_config`: what a reader in any language needs.

    The orders of the two factors follow from the sizes; they are written so that nobody has to
    search for them. Their product is the block that is repeated over the channels.
    """
    residual = None if rotation.seed is None else list(factors(block_of(architecture.hidden)) or ())
    return {
        "residual_seed": rotation.seed,
        "residual_factors": residual,
        "online_hadamard": rotation.online_hadamard,
        "online_factors": {
            name: list(factors(block) or ())
            for name, block in online_blocks(architecture, rotation).items()
        },
    }


def rotation_of_section(config: Mapping[str, Any], architecture: Architecture) -> Rotation:
    """Read the rotation back from a config that has a `quantization_config`; absent means none.

    Raises:
        CheckpointInvalid: if a field is unknown or missing, the family cannot be rotated, or the
            factors are not those of this version.
    """
    record = config["quantization_config"].get("rotation")
    if record is None:
        return Rotation.none()
    if not isinstance(record, Mapping):
        raise CheckpointInvalid(f"rotation {record!r} is no JSON object")
    online = record.get("online_hadamard")
    if not isinstance(online, bool):
        raise CheckpointInvalid(f"rotation.online_hadamard {online!r} is neither true nor false")
    try:
        rotation = Rotation(seed=record.get("residual_seed"), online_hadamard=online)
        check_rotation(architecture, rotation)
    except SpecError as error:
        raise CheckpointInvalid(f"rotation is not possible: {error}") from error
    wanted = rotation_section(architecture, rotation)
    for name in sorted({*record, *wanted}):
        # a rotation that is only nearly right gives a model that talks nonsense
        if name not in record or name not in wanted or record[name] != wanted[name]:
            raise CheckpointInvalid(
                f"rotation.{name} is {record.get(name)!r}; this version reads {wanted.get(name)!r}"
            )
    return rotation

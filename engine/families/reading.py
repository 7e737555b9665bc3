"""Reading sizes and kept fields out of a stranger's config by the family's table; torch-free."""

from collections.abc import Mapping
from typing import Any

from engine.families.base import Family
from engine.families.config import unsupported, whole
from engine.families.sizes import Sizes

__all__ = ["read_fields", "read_sizes"]

# the largest published decoders stay well below each of these
LIMITS = {
    "layers": 256,
    "hidden": 32_768,
    "intermediate": 262_144,
    "heads": 512,
    "kv_heads": 512,
    "head_dim": 1024,
    "vocab": 1_000_000,
    "positions": 16_777_216,
    "experts": 64,
    "embedding": 32_768,
}
DEFAULT_MAX_POSITIONS = 2048


def read_sizes(family: Family, config: Mapping[str, Any]) -> Sizes:
    """Read the sizes of a model.

    Raises:
        UnsupportedModel: naming the field, its value and what would do.
    """
    names = family.size_fields
    layers = _size(config, names.layers, "layers")
    hidden = _size(config, names.hidden, "hidden")
    intermediate = _size(config, names.intermediate, "intermediate")
    vocab = _size(config, names.vocab, "vocab")
    heads = _size(config, names.heads, "heads")
    kv_heads = _size(config, names.kv_heads, "kv_heads", default=heads)
    if heads % kv_heads:
        raise unsupported(str(names.kv_heads), kv_heads, f"a divisor of {heads} heads")
    known = names.head_dim is not None and config.get(names.head_dim) is not None
    if not known and hidden % heads:
        raise unsupported(names.hidden, hidden, f"a multiple of {heads} heads")
    head_dim = _size(config, names.head_dim, "head_dim", default=hidden // heads)
    if head_dim % 2:
        raise unsupported(
            names.head_dim or names.hidden,
            head_dim if names.head_dim else hidden,
            "heads of an even size: rotary positions pair channels",
        )
    return Sizes(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        positions=_size(config, names.positions, "positions", default=DEFAULT_MAX_POSITIONS),
        experts=_size(config, names.experts, "experts") if names.experts else 0,
        embedding=_size(config, names.embedding, "embedding", default=hidden),
    )


def read_fields(family: Family, config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Keep checked fields, and the sizes by the names that the model class knows.

    Raises:
        UnsupportedModel: naming the field, its value and what would do.
    """
    kept: dict[str, Any] = {}
    for name, rule in family.fields.items():
        value = config.get(name)
        if value is not None:
            rule.check(name, value)
            kept[name] = rule.convert(value)
        elif rule.nullable and name in config:
            kept[name] = None
    kinds = kept.get("layer_types")
    if kinds is not None and len(kinds) != sizes.layers:
        raise unsupported("layer_types", kinds, f"one kind for each of {sizes.layers} layers")
    if "sliding_attention" in (kinds or []) and kept.get("sliding_window", 1) is None:
        raise unsupported(
            "sliding_window", None, "a window, because layer_types has layers with one"
        )
    names = family.size_fields
    for size in LIMITS:
        name = getattr(names, size)
        if name is not None:
            kept[name] = getattr(sizes, size)
    return {**kept, "model_type": family.model_type}


def _size(
    config: Mapping[str, Any], name: str | None, limit: str, default: int | None = None
) -> int:
    """Read a size; `name` None or a silent config give the default."""
    value = config.get(name) if name is not None else None
    value = default if value is None else value
    whole(1, LIMITS[limit]).check(name or limit, value)
    assert isinstance(value, int), "the check let nothing else pass"
    return value

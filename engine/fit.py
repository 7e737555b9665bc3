"""Whether a quantization fits a model, and what it will take; torch-free, from sizes alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from engine.architecture import Architecture, LinearShape
from engine.effort import SearchPlan, plan_search, search_units
from engine.errors import SpecError
from engine.footprint import Footprint
from engine.reach import FP_BYTES, Reach, stored_bits
from engine.recipe import EndToEnd
from engine.rotation import Rotation, check_rotation, online_blocks
from engine.spec import FULL_BITS, GROUP_STEP, PER_CHANNEL, QuantSpec

__all__ = ["Estimate", "check_spec", "estimate_bytes", "promised_bits"]

SEARCH_COPIES = 2
"""A block's weights, and one of its linears rounded, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a quantization will take, from sizes alone."""

    parameters: int
    bits_per_weight: float
    source_bytes: int
    result_bytes: int
    state_bytes: int
    """Resumable block checkpoints."""
    memory_bytes: int
    """What the device must have while one block learns, or while bits are searched. On a CPU with
    embedding and hidden states; on a GPU without, because those live elsewhere where it is small.
    Tuning end to end is left out where it does not fit, so it is not counted."""
    chain_bytes: int
    """Hidden states of all samples, wherever they live."""
    host_bytes: int
    """Main memory beside them: the embedding, and a block on its way; on a CPU `memory_bytes`."""
    calibration_flops: float
    """Of the search for bits as well, where there is a target."""

    @property
    def disk_bytes(self) -> int:
        """Source, block checkpoints, and the result with a tenth of slack."""
        return self.source_bytes + self.state_bytes + self.result_bytes * 11 // 10


def check_spec(architecture: Architecture, spec: QuantSpec) -> None:
    """Refuse a quantization that this model cannot take.

    Raises:
        SpecError: naming the field, the value, the layer and what would do.
    """
    names = [each.name for each in architecture.linears]
    for index, override in enumerate(spec.overrides):
        if not any(fnmatchcase(name, override.pattern) for name in names):
            example = names[-1]
            raise SpecError(
                f"overrides[{index}].pattern",
                override.pattern,
                f"it matches no linear layer of this model; a layer is called {example}",
            )
    for linear in architecture.linears:
        _check_group_size(architecture, spec, linear)
    check_rotation(architecture, Rotation.of(spec, architecture))
    _check_online(architecture, spec)
    _check_attention(architecture, spec)
    if not any(spec.weight_grid(name) for name in names):
        raise SpecError("overrides", len(spec.overrides), "leave at least one layer below 16 bits")
    if spec.calibration.length > architecture.max_positions:
        raise SpecError(
            "calibration.length",
            spec.calibration.length,
            f"the model has {architecture.max_positions} positions; use at most that",
        )
    if spec.target is not None:
        Reach.of(architecture, spec).check(spec.target)


def promised_bits(architecture: Architecture, spec: QuantSpec) -> float:
    """Stored bits per quantized weight: planes, scales and zero-points; biases are no weights.

    With a target it is a bound: what the target allows, or the widest of its widths where it is
    about perplexity.
    """
    quantized = [each for each in architecture.linears if spec.weight_grid(each.name)]
    return _packed_bits(architecture, spec) / sum(each.weights for each in quantized)


def estimate_bytes(
    architecture: Architecture, spec: QuantSpec, device_type: str = "cpu"
) -> Estimate:
    """Estimate disk, memory and arithmetic of a quantization; a search depends on the device."""
    quantized = [each for each in architecture.linears if spec.weight_grid(each.name)]
    packed = _packed_bits(architecture, spec) // 8
    parameters = architecture.parameter_count
    rest = parameters - sum(each.weights for each in quantized)
    search = _plan_of(architecture, spec, device_type)
    footprint = Footprint(architecture=architecture, spec=spec, device_type=device_type)
    memory = _learning_bytes(footprint, search, in_one=device_type == "cpu")
    host = footprint.embedding_bytes + footprint.source_block_bytes
    return Estimate(
        parameters=parameters,
        bits_per_weight=promised_bits(architecture, spec),
        source_bytes=parameters * FP_BYTES,
        result_bytes=packed + rest * FP_BYTES,
        state_bytes=packed + _remainder_bytes(quantized, spec),
        memory_bytes=memory,
        chain_bytes=footprint.chain_bytes,
        host_bytes=memory if device_type == "cpu" else host,
        calibration_flops=footprint.flops + (0 if search is None else search.flops),
    )


def _learning_bytes(footprint: Footprint, search: SearchPlan | None, *, in_one: bool) -> int:
    """Peak of calibration and search; `in_one` where the device's memory is the host's."""
    block, embedding = footprint.block_bytes, 0
    if in_one:
        block, embedding = block + footprint.chain_bytes, footprint.embedding_bytes
    if search is None:
        return embedding + block
    searched = SEARCH_COPIES * footprint.source_block_bytes + search.wave_bytes
    return embedding + max(block, searched)


def _packed_bits(architecture: Architecture, spec: QuantSpec) -> int:
    if spec.target is not None:
        return Reach.of(architecture, spec).limit_bits(spec.target)
    grids = [(each, spec.weight_grid(each.name)) for each in architecture.linears]
    return sum(stored_bits(linear, grid) for linear, grid in grids if grid is not None)


def _plan_of(architecture: Architecture, spec: QuantSpec, device_type: str) -> SearchPlan | None:
    if spec.target is None:
        return None
    return plan_search(architecture, spec, search_units(architecture, spec), device_type)


def _check_online(architecture: Architecture, spec: QuantSpec) -> None:
    """Refuse a transform at run time that would be none, where it is asked for by itself."""
    asked = spec.ingredients.online_hadamard
    if asked and not online_blocks(architecture, Rotation.of(spec, architecture)):
        raise SpecError(
            "ingredients.online_hadamard",
            asked,
            f"no linear of {architecture.model_type} takes it with this config; leave it out",
        )


def _check_attention(architecture: Architecture, spec: QuantSpec) -> None:
    """Refuse what meets queries and maps inside sdpa, where a family computes them by itself."""
    family = architecture.family
    if family.attention == "sdpa":
        return
    advice = f"{family.model_type} computes its attention outside sdpa; use"
    if spec.q_bits != FULL_BITS:
        raise SpecError("q_bits", spec.q_bits, f"{advice} {FULL_BITS}")
    if spec.resolved.attention_loss:
        raise SpecError("ingredients.attention_loss", spec.resolved.attention_loss, f"{advice} 0")


def _remainder_bytes(quantized: Sequence[LinearShape], spec: QuantSpec) -> int:
    """What the store keeps of weights that the last stage still trains, in 16 bits each."""
    trains = spec.resolved.end_to_end is EndToEnd.WEIGHTS
    return FP_BYTES * sum(each.weights for each in quantized) if trains else 0


def _check_group_size(architecture: Architecture, spec: QuantSpec, linear: LinearShape) -> None:
    grid = spec.weight_grid(linear.name)
    if grid is None or linear.in_features % grid.group_of(linear.in_features) == 0:
        return
    common = math.gcd(*(each.in_features for each in architecture.linears_per_layer))
    fitting = [size for size in range(GROUP_STEP, common + 1, GROUP_STEP) if common % size == 0]
    raise SpecError(
        "group_size",
        grid.group_size,
        f"it does not divide the K = {linear.in_features} inputs of {linear.name}; use"
        f" {', '.join(map(str, (PER_CHANNEL, *fitting)))}",
    )

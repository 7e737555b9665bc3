"""The bit search as a stage of a quantization: files of a model in, a spec out."""

from pathlib import Path

import torch

from engine.calibration.resume import fingerprint
from engine.calibration.watch import Watch
from engine.models.loading import SourceModel, read_config
from engine.models.rotated import rotated
from engine.rotation import Rotation
from engine.search.measurements import MeasurementStore
from engine.search.search import BitSearch, FoundBits, measured_spec
from engine.spec import QuantSpec

__all__ = ["find_bits", "kept_bytes"]


def find_bits(
    source: SourceModel,
    spec: QuantSpec,
    tokens: torch.Tensor,
    *,
    state_dir: Path,
    device: torch.device,
    watch: Watch,
) -> FoundBits:
    """Give every layer of a model its bits; without a target, leave the spec as it is.

    Args:
        source: the model on disk.
        spec: what is asked for.
        tokens: int64 ``[W, T]``, the calibration windows.
        state_dir: where measurements are kept, and found by a later attempt.
        device: where blocks run.
        watch: told the progress, asked whether to go on.

    Raises:
        SpecError: if the target is out of reach, naming the range.
        CalibrationDiverged: naming the layer.
        CalibrationInterrupted: if the watch says to stop; what was measured stays.
    """
    if spec.target is None:
        return FoundBits(spec=spec, record=None)
    config = read_config(source.tensors.directory)
    mark = fingerprint(config, source.tensors, tokens, measured_spec(spec), device)
    search = BitSearch(
        # what calibration will round
        model=rotated(source, Rotation.of(spec, source.architecture)),
        spec=spec,
        rest_bytes=kept_bytes(source, spec),
        store=MeasurementStore.open(state_dir, mark),
        watch=watch,
        device=device,
    )
    return search.run(tokens)


def kept_bytes(source: SourceModel, spec: QuantSpec) -> int:
    """Count the bytes of all tensors that are stored as they are, in the dtype of the files."""
    linears = source.architecture.linears
    quantized = {f"{each.name}.weight" for each in linears if spec.weight_grid(each.name)}
    names = [
        name
        for name in source.skeleton.state_dict()
        if name not in quantized and not source.is_tied(name)
    ]
    # one at a time: the embedding alone may be gigabytes
    return sum(source.tensors.read([name])[name].nbytes for name in names)

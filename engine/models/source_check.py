"""What is checked of a source's weights before any work: that every one of them is finite."""

from collections.abc import Callable

import torch

from engine.errors import CalibrationDiverged
from engine.models.loading import SourceModel

__all__ = ["check_finite"]


def check_finite(source: SourceModel, on_tensor: Callable[[], None] = lambda: None) -> None:
    """Read every tensor of the model once, one at a time, and refuse NaN and infinity.

    Args:
        source: on disk.
        on_tensor: called before each tensor; may raise.

    Raises:
        CalibrationDiverged: naming the module and the tensor.
    """
    names = [name for name in source.skeleton.state_dict() if not source.is_tied(name)]
    for name, tensor in source.tensors.stream(names):
        on_tensor()
        # NaN passes through minimum and maximum; a mask would take as much memory as the tensor
        if not all(bool(torch.isfinite(each)) for each in tensor.aminmax()):
            layer, _, short = name.rpartition(".")
            raise CalibrationDiverged(layer, f"its {short} is not finite in the source model")

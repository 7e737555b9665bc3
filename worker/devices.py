"""The GPUs of this machine, read through NVML; CUDA is never initialized here.

The worker forks, and a forked process must not inherit a CUDA context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from api.telemetry import get_logger

__all__ = ["Gpu", "choose_gpu", "list_gpus", "select_visible"]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as the driver sees it now."""

    index: int
    uuid: str
    """What `CUDA_VISIBLE_DEVICES` of a child is set to."""
    name: str
    total_bytes: int
    free_bytes: int


def choose_gpu(visible: str | None) -> Gpu | None:
    """The GPU with the most free memory; None on a machine without one.

    Args:
        visible: the worker's own `CUDA_VISIBLE_DEVICES`; None leaves every GPU in the choice.
    """
    gpus = select_visible(list_gpus(), visible)
    return max(gpus, key=lambda gpu: gpu.free_bytes, default=None)


def list_gpus() -> tuple[Gpu, ...]:
    """Every GPU of the machine; empty where there is no driver or no NVML."""
    try:
        import pynvml  # noqa: PLC0415 - belongs to the GPU side's extra, a CPU worker lacks it
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_read_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        log.warning("gpu_inventory_failed", error=str(error))
        return ()
    finally:
        pynvml.nvmlShutdown()


def select_visible(gpus: Sequence[Gpu], visible: str | None) -> tuple[Gpu, ...]:
    """Keep what a `CUDA_VISIBLE_DEVICES` value names by index or by the start of a UUID.

    Like the driver, the list ends at the first name that fits no GPU.
    """
    if visible is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for name in (part.strip() for part in visible.split(",")):
        found = [
            gpu for gpu in gpus if name and (name == str(gpu.index) or gpu.uuid.startswith(name))
        ]
        if not found:
            break
        chosen.append(found[0])
    return tuple(chosen)


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        index=index,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=memory.total,
        free_bytes=memory.free,
    )

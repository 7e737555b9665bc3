"""Small fused operations whose kernels run on the machine at hand."""

import torch

from tests.kernels.conftest import load_kernel_module


def load_small_op(name, kernels, monkeypatch):
    """Load `kernels.<name>` with private copies of the files that hold its kernels.

    Args:
        name: the module with the launchers.
        kernels: pairs of a file and the kernel that the launchers call.
        monkeypatch: undoes it all.
    """
    interpreted = not torch.cuda.is_available()
    module = load_kernel_module(name, interpreted=interpreted, monkeypatch=monkeypatch)
    for file, kernel in kernels:
        copy = load_kernel_module(file, interpreted=interpreted, monkeypatch=monkeypatch)
        monkeypatch.setattr(module, kernel, getattr(copy, kernel))
    return module

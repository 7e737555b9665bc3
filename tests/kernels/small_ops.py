"""Small fused operations whose kernels run on the machine at hand."""

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.kernels.conftest import load_kernel_module


def load_small_op(name, kernels, monkeypatch):
    """Load `kernels.<name>` with a private copy of the file that holds its kernels.

    Args:
        name: the module with the launchers.
        kernels: None, or that file and the kernels that the launchers call.
        monkeypatch: undoes it all.
    """
    interpreted = not torch.cuda.is_available()
    if interpreted:
        interpret_reductions(monkeypatch)
    module = load_kernel_module(name, interpreted=interpreted, monkeypatch=monkeypatch)
    if kernels is not None:
        file, names = kernels
        copy = load_kernel_module(file, interpreted=interpreted, monkeypatch=monkeypatch)
        for kernel in names:
            monkeypatch.setattr(module, kernel, getattr(copy, kernel))
    return module


def interpret_reductions(monkeypatch):
    """Let the interpreter run Triton's own functions, which were compiled ones at its import."""
    for each, member in vars(tl).copy().items():
        if isinstance(member, JITFunction):
            monkeypatch.setattr(tl, each, InterpretedFunction(member.fn))
    # the interpreter changes the language for a kernel and changes it back, but for a function that
    # the kernel calls it leaves the change, and nothing could be compiled in this process any more
    for name, member in vars(tl.core).copy().items():
        if tl.core.is_builtin(member):
            monkeypatch.setattr(tl.core, name, member)

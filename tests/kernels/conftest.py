"""The kernels as the machine at hand can run them: on its GPU, else in Triton's interpreter."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.tile_cases import load_kernel_modules

KERNELS = Path(__file__).parents[2] / "kernels"


def load_kernel_module(name, *, interpreted, monkeypatch):
    """Import a private copy; `triton.jit` decides at import whether it interprets."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    copy = f"{name}_{'interpreted' if interpreted else 'compiled'}"
    spec = importlib.util.spec_from_file_location(copy, KERNELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, copy, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def skip_without_gpu(request):
    """A test that is marked `gpu` runs where there is one."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def int_linear(monkeypatch, device):
    """`kernels.int_linear` whose Triton kernel runs here."""
    return load_kernel_module("int_linear", interpreted=device == "cpu", monkeypatch=monkeypatch)


@pytest.fixture
def column_rounding(monkeypatch, device):
    """`kernels.column_rounding` whose Triton kernel runs here."""
    name = "column_rounding"
    return load_kernel_module(name, interpreted=device == "cpu", monkeypatch=monkeypatch)


@pytest.fixture
def activation_rounding(monkeypatch, device):
    """`kernels.activation_rounding` whose Triton kernels run here."""
    name = "activation_rounding"
    return load_kernel_module(name, interpreted=device == "cpu", monkeypatch=monkeypatch)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill fresh tensors with garbage, so that an element nobody wrote shows."""
    original = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        fresh = original(*args, **kwargs)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def unpack(monkeypatch, device):
    """`kernels.unpack` and what it calls, whose Triton kernels run here."""
    names = ["field_codes", "unpack"]
    return load_kernel_modules(names, interpreted=device == "cpu", monkeypatch=monkeypatch)

"""Replacing linear layers of a model by their quantized forms, by full name."""

from collections.abc import Callable, Mapping

from torch import nn

from engine.modules.linear import QuantLinear

__all__ = ["named_linears", "prepare_model", "quant_linears", "swap_linears", "swap_modules"]


def named_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Find the plain linear layers below a module, in the order of definition."""
    return {name: each for name, each in module.named_modules() if type(each) is nn.Linear}


def quant_linears(module: nn.Module) -> dict[str, QuantLinear]:
    """Find the quantized linear layers below a module, in the order of definition."""
    return {name: each for name, each in module.named_modules() if isinstance(each, QuantLinear)}


def swap_linears(
    module: nn.Module, replace: Callable[[str, nn.Linear], nn.Module | None]
) -> list[str]:
    """Offer every plain linear layer for replacement.

    Args:
        module: changed in place.
        replace: makes the new layer from full name and old layer; None keeps the old one.

    Returns:
        The names that were replaced.
    """
    offered = {name: replace(name, each) for name, each in named_linears(module).items()}
    swaps = {name: new for name, new in offered.items() if new is not None}
    swap_modules(module, swaps)
    return list(swaps)


def swap_modules(module: nn.Module, swaps: Mapping[str, nn.Module]) -> None:
    """Put modules in place of those of the given names."""
    for name, new in swaps.items():
        module.set_submodule(name, new)


def prepare_model(module: nn.Module) -> None:
    """Derive the run-time operand of every quantized layer, on the device it is on."""
    for each in quant_linears(module).values():
        each.prepare()

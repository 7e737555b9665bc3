"""Logits of a checkpoint, block by block as calibration computes them."""

import torch

from engine.calibration.block import run_windows
from engine.calibration.capture import capture_inputs
from engine.models.blocks import ResidentModel
from engine.recipe import FULL_BITS


def draw_tokens(windows=1, length=24):
    """Tokens that nothing was calibrated with."""
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def chained_logits(loaded, tokens):
    """Of a whole sequence at once: no key or value is kept, and so none is rounded."""
    model = ResidentModel(architecture=loaded.architecture, skeleton=loaded.model)
    inputs = capture_inputs(model, tokens)
    hidden = inputs.hidden
    for index, call in enumerate(inputs.calls):
        hidden = run_windows(model.load_block(index), call, hidden, FULL_BITS)
    return model.load_head()(hidden)

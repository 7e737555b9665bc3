"""The end of a calibration: the whole quantized model is tuned where memory allows."""

import torch

from engine.calibration.block_loop import BlockLoop, Calibrated
from engine.calibration.capture import capture_inputs
from engine.calibration.placement import Place, free_bytes
from engine.calibration.restore import restore_block
from engine.calibration.resume import Tuning
from engine.calibration.tune import QuantizedStack, tune_end_to_end
from engine.errors import CheckpointInvalid
from engine.events import Stage, StageStarted
from engine.methods.base import Method
from engine.methods.recipes import method_of
from engine.recipe import EndToEnd

__all__ = ["finish"]

SCALE_BYTES, WEIGHT_BYTES = 2, 24
"""A weight in memory: its code; or as float with offset, gradient, two moments and the best."""
FREE_PART = 0.8


def finish(loop: BlockLoop, calibrated: Calibrated, tokens: torch.Tensor) -> Tuning | None:
    """Tune the model in the loop's store, unless it is not asked for or cannot fit.

    An attempt that finds the stage done gives what was found then.

    Args:
        loop: has run.
        calibrated: what it left behind.
        tokens: int64 ``[W, T]``, the calibration windows.

    Raises:
        CalibrationDiverged: if logits are not finite.
        CalibrationInterrupted: if the watch says to stop.
    """
    method = method_of(loop.spec)
    if method.end_to_end is EndToEnd.NONE or not method.end_to_end_epochs:
        return None
    found = loop.store.load_tuned()
    if found is not None:
        return found
    loop.watch.report(StageStarted(stage=Stage.TUNING))
    needed, free = _needed_bytes(loop, calibrated, method), free_bytes(loop.device)
    if needed > FREE_PART * free:
        loop.watch.say(
            f"no tuning end to end: it needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        )
        return None
    stack = _assemble(loop, calibrated)
    inputs = capture_inputs(loop.model, tokens, loop.device, calibrated.placement).hidden
    tuning = tune_end_to_end(
        stack, inputs, calibrated.last_hidden, method, loop.spec.calibration, loop.watch
    )
    loop.watch.say(
        f"tuned end to end: {tuning.before:.4f} -> {tuning.after:.4f} nats a token from the"
        " full-precision logits"
    )
    loop.store.save_tuned(tuning)
    return tuning


def _assemble(loop: BlockLoop, calibrated: Calibrated) -> QuantizedStack:
    architecture = loop.model.architecture
    names = [architecture.layer_name(index) for index in range(architecture.layers)]
    blocks = []
    for index, name in enumerate(names):
        saved = loop.store.load(index)
        if saved is None:
            raise CheckpointInvalid(f"the calibration of {name} is missing")
        blocks.append(loop.model.load_block(index).to(loop.device))
        restore_block(blocks[-1], name, saved, loop.spec, loop.shape.hadamards)
    return QuantizedStack(
        blocks=tuple(blocks),
        names=tuple(names),
        calls=calibrated.calls,
        head=loop.model.load_head().to(loop.device),
        kv_bits=loop.spec.kv_bits,
        can_record=loop.shape.can_record,
    )


def _needed_bytes(loop: BlockLoop, calibrated: Calibrated, method: Method) -> float:
    architecture = loop.model.architecture
    weights = sum(each.weights for each in architecture.linears)
    per_weight = WEIGHT_BYTES if method.end_to_end is EndToEnd.WEIGHTS else SCALE_BYTES
    tokens = loop.spec.calibration.batch * loop.spec.calibration.length
    # every block's input is kept for its second forward; one block's inside at a time
    hidden = 4 * tokens * architecture.hidden * (architecture.layers + 16)
    inside = 4 * tokens * (8 * architecture.intermediate + 4 * loop.spec.calibration.length)
    head = 8 * architecture.vocab * (architecture.hidden + 2048)
    # the teacher's hidden states are there already; the inputs come beside them
    beside = Place.HOST if loop.device.type == "cpu" else Place.DEVICE
    chains = calibrated.last_hidden.nbytes if calibrated.placement.place is beside else 0
    return float(weights * per_weight + hidden + inside + head + chains)

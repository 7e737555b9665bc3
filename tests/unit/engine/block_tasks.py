"""Blocks of tiny models as calibration is given them, with a quantized chain that went astray."""

import torch

from engine.calibration.block import BlockShape, BlockTask, run_windows
from engine.calibration.capture import capture_inputs
from engine.calibration.watch import Watch
from engine.methods.losses import token_weights
from engine.models.loading import SourceModel
from engine.rotation import Rotation, online_blocks
from engine.spec import FULL_BITS, CalibrationSpec, QuantSpec

TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
QUIET = Watch(on_event=lambda _: None)
ONLINE = Rotation(seed=None, online_hadamard=True)


def make_task(folder, *, tokens=TOKENS, astray=0.05, index=0, rotation=None):
    """Make the task of one block; `astray` is the size of the quantized chain's error."""
    source = SourceModel.open(folder)
    architecture = source.architecture
    inputs = capture_inputs(source, tokens)
    block, call = source.load_block(index), inputs.calls[index]
    wanted = run_windows(block, call, inputs.hidden, FULL_BITS)
    noise = torch.randn(inputs.hidden.shape, generator=torch.Generator().manual_seed(7))
    hadamards = {} if rotation is None else online_blocks(architecture, rotation)
    return BlockTask(
        index=index,
        total=architecture.layers,
        name=architecture.layer_name(index),
        block=block,
        call=call,
        shape=BlockShape.of(architecture, hadamards),
        inputs=inputs.hidden + astray * inputs.hidden.std() * noise,
        full_inputs=inputs.hidden,
        wanted=wanted,
        token_weight=token_weights(wanted),
    )


def make_spec(**fields):
    calibration = CalibrationSpec(
        samples=4, length=24, epochs=fields.pop("epochs", 2), batch=fields.pop("batch", 2)
    )
    return QuantSpec(**{"w_bits": 3, "a_bits": 8, "calibration": calibration, **fields})


def error_of(block, task, kv_bits=FULL_BITS):
    """Mean square of what a block's outputs miss."""
    outputs = run_windows(block, task.call, task.inputs, kv_bits)
    return float(((outputs - task.wanted).square() * task.token_weight).mean())

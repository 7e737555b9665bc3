"""The loop over decoder blocks: two chains of activations, one block in memory, one file a block.

The full-precision chain tells what each block should put out; the quantized chain carries the
errors of all blocks before. Three tensors hold both: the full-precision chain's inputs and outputs,
and the quantized chain, which each kept block rewrites in place. A finished block is on disk before
the next one starts; a later attempt runs the same chains forward through the stored blocks and goes
on behind the last.

On a GPU, float32 products compute what is compared: both chains and the measured errors. What only
starts or steers learning (statistics, training) is rounded to bfloat16 (`precision.py`).

Shape legend: W windows, T tokens, H hidden size.
"""

import resource
import time
from dataclasses import dataclass, field

import torch

from engine.calibration.block import BlockShape, BlockTask, LearnedBlock, run_windows
from engine.calibration.capture import BlockCall, capture_inputs
from engine.calibration.learn import learn_block
from engine.calibration.placement import ChainMemory, Placement
from engine.calibration.restore import QUANT_PARTS, REMAINDER, restore_block
from engine.calibration.resume import BlockStore, SavedBlock
from engine.calibration.watch import BlockStep, Watch
from engine.events import CheckpointSaved, LayerFinished, LayerStarted
from engine.footprint import Footprint
from engine.methods.losses import token_weights
from engine.methods.recipes import method_of
from engine.models.blocks import BlockModel
from engine.spec import FULL_BITS, QuantSpec

__all__ = ["BlockLoop", "BlockLosses", "Calibrated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLosses:
    """Mean squared errors of a block's output."""

    before: float
    """With plain rounding."""
    after: float
    """With what was kept."""
    fell_back: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What the loop leaves behind beside the store."""

    losses: list[BlockLosses]
    calls: tuple[BlockCall, ...]
    last_hidden: torch.Tensor
    """``[W, T, H]`` outputs of the full-precision chain's last block."""
    placement: Placement
    """Where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chains:
    quantized: torch.Tensor
    """``[W, T, H]``."""
    full_precision: torch.Tensor
    """``[W, T, H]``; the same tensor before the first block."""
    spare: torch.Tensor | None
    """``[W, T, H]`` that nobody reads any more; takes what comes next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLoop:
    """Quantizes the blocks of one model into a store."""

    model: BlockModel
    """The source, in full precision."""
    spec: QuantSpec
    store: BlockStore
    """Takes finished blocks, gives those of an earlier attempt."""
    watch: Watch
    device: torch.device
    """Where blocks run."""
    shape: BlockShape
    """What the family's table says about a block."""
    memory: ChainMemory = field(default_factory=ChainMemory)
    """What hidden states may take; says where they are, and changes no result."""

    def run(self, tokens: torch.Tensor) -> Calibrated:
        """Quantize every block.

        Args:
            tokens: int64 ``[W, T]``, the calibration windows.

        Raises:
            CalibrationDiverged: naming the layer; finished blocks stay in the store.
            CalibrationInterrupted: if the watch says to stop; finished blocks stay in the store.
        """
        placement = self._choose_place()
        inputs = capture_inputs(self.model, tokens, self.device, placement)
        chains = _Chains(quantized=inputs.hidden, full_precision=inputs.hidden, spare=None)
        losses = []
        for index, call in enumerate(inputs.calls):
            self.watch.check()
            self.watch.report(self._started(index))
            started_s = time.monotonic()
            found = self.store.load(index)
            saved, chains = self._step(index, call, chains, found, placement)
            losses.append(
                BlockLosses(
                    before=saved.loss_before, after=saved.loss_after, fell_back=saved.fell_back
                )
            )
            if found is None:
                self.watch.on_step(BlockStep.SAVING)
                self.store.save(index, saved)
                self.watch.report(CheckpointSaved(index=index))
            seconds = time.monotonic() - started_s
            self.watch.report(self._finished(index, saved, seconds, resumed=found is not None))
        return Calibrated(
            losses=losses,
            calls=inputs.calls,
            last_hidden=chains.full_precision,
            placement=placement,
        )

    def _step(
        self,
        index: int,
        call: BlockCall,
        chains: _Chains,
        found: SavedBlock | None,
        placement: Placement,
    ) -> tuple[SavedBlock, _Chains]:
        """Bring both chains past one block, learning it unless it was found."""
        self.watch.on_step(BlockStep.LOADING)
        block = self.model.load_block(index).to(self.device)
        self.watch.on_step(BlockStep.TEACHING)
        before = chains.full_precision
        room = chains.spare
        if room is None:
            room = placement.empty(before.shape, before.dtype)
        wanted = run_windows(block, call, before, FULL_BITS, out=room)
        name = self.model.architecture.layer_name(index)
        if found is not None:
            restore_block(block, name, found, self.spec, self.shape.hadamards)
            saved = found
        else:
            task = BlockTask(
                index=index,
                total=self.model.architecture.layers,
                name=name,
                block=block,
                call=call,
                shape=self.shape,
                inputs=chains.quantized,
                full_inputs=before,
                wanted=wanted,
                token_weight=token_weights(wanted, self.device),
                placement=placement,
            )
            saved = _as_saved(learn_block(task, self.spec, method_of(self.spec), self.watch))
        self.watch.on_step(BlockStep.PASSING)
        # nobody asks for the inputs again, so outputs take their place
        run_windows(block, call, chains.quantized, self.spec.kv_bits, out=chains.quantized)
        spare = None if before is chains.quantized else before
        return saved, _Chains(quantized=chains.quantized, full_precision=wanted, spare=spare)

    def _choose_place(self) -> Placement:
        footprint = Footprint(
            architecture=self.model.architecture, spec=self.spec, device_type=self.device.type
        )
        placement = Placement.choose(
            footprint.chain_bytes,
            footprint.block_bytes,
            self.memory,
            self.device,
            self.store.directory,
        )
        self.watch.say(
            f"hidden states take {footprint.chain_bytes / 1e9:.2f} GB, kept on {placement.place}"
        )
        return placement

    def _started(self, index: int) -> LayerStarted:
        prefix = f"{self.model.architecture.layer_name(index)}."
        linears = self.model.architecture.linears_per_layer
        bits = {}
        for linear in linears:
            short = linear.name.removeprefix(f"{self.model.architecture.layer_name(0)}.")
            grid = self.spec.weight_grid(prefix + short)
            bits[short] = FULL_BITS if grid is None else grid.bits
        return LayerStarted(
            index=index,
            total=self.model.architecture.layers,
            name=self.model.architecture.layer_name(index),
            bits=bits,
        )

    def _finished(
        self, index: int, saved: SavedBlock, seconds: float, *, resumed: bool
    ) -> LayerFinished:
        return LayerFinished(
            index=index,
            total=self.model.architecture.layers,
            name=self.model.architecture.layer_name(index),
            loss_before=saved.loss_before,
            loss_after=saved.loss_after,
            seconds=round(seconds, 3),
            memory_bytes=_peak_memory(self.device),
            resumed=resumed,
        )


def _as_saved(learned: LearnedBlock) -> SavedBlock:
    packed = {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in learned.layers.items()
        for part in QUANT_PARTS
    }
    remainders = {
        f"{name}.{REMAINDER}": layer.remainder
        for name, layer in learned.layers.items()
        if layer.remainder is not None
    }
    return SavedBlock(
        tensors=packed | remainders | learned.others,
        loss_before=learned.loss_before,
        loss_after=learned.loss_after,
        fell_back=learned.fell_back,
    )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in units of 1024 bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

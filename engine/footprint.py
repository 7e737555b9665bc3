"""What a calibration takes of memory and arithmetic, from sizes alone; torch-free.

Of each weight of the block that learns, bytes:

    4 source  +  4 changed by second-order rounding or a transformation
    training   4 learned + 4 gradient + 8 moments (AdamW) + 4 best state    where codes are learned
               + 4 fake-quantized + 2 operand of the product + 4 gradient of it
    rounding   second moments of a linear's K inputs: six float32 [K, K], and three [N, K]

Rounding and training do not happen at once, so the larger one counts. Products are counted as two
operations for each weight and token, a backward pass as two products; with W the weights of a layer
that a token meets:

    flops = 2 W tokens layers (passes + 3 epochs + 4 end-to-end epochs)
"""

from dataclasses import dataclass

from engine.architecture import Architecture
from engine.recipe import Clipping, EndToEnd, Resolved, Rounding, SecondOrder
from engine.spec import QuantSpec

__all__ = ["Footprint"]

FLOAT_BYTES = 4
"""Calibration computes in float32."""
SOURCE_BYTES, CHANGED_BYTES, LEARNED_BYTES, TWIN_BYTES = 4, 4, 20, 10
MOMENT_COPIES = 6
"""Own and shift, the damped ones, their factor, the inverse and its factor."""
LINEAR_COPIES = 3
"""Of the linear that is being rounded: before, between and after."""
CHAINS = 3
"""Inputs of the full-precision chain, its outputs, and the quantized chain."""
BASE_PASSES = 3
"""The teacher, the error of plain rounding, and the outputs of what was kept."""
CALL_TOKENS = 8192
"""Tokens of one forward outside training, on a GPU."""
MAP_BYTES = 8
"""Of one attention probability in training on a GPU: scores, their softmax and a gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """One calibration by one recipe."""

    architecture: Architecture
    spec: QuantSpec
    device_type: str = "cpu"

    @property
    def chain_bytes(self) -> int:
        """Hidden states of all windows, in every chain that is alive at once."""
        chains = CHAINS + (self.spec.resolved.compares_own and self._learns)
        return chains * self._tokens * self.architecture.hidden * FLOAT_BYTES

    @property
    def block_bytes(self) -> int:
        """Peak of one block beside the chains: weights, what is learned, activations inside."""
        layer = sum(each.weights for each in self.architecture.linears_per_layer)
        return SOURCE_BYTES * layer + max(
            self._rounding_bytes(layer), self._training_bytes(layer), self._forward_bytes()
        )

    @property
    def embedding_bytes(self) -> int:
        """The input embedding, in main memory while windows are embedded."""
        return self.architecture.vocab * self.architecture.hidden * FLOAT_BYTES

    @property
    def source_block_bytes(self) -> int:
        """One block on its way to the device."""
        layer = sum(each.weights for each in self.architecture.linears_per_layer)
        return SOURCE_BYTES * layer

    @property
    def flops(self) -> float:
        """Of all layers, and of tuning end to end."""
        architecture, chosen = self.architecture, self.spec.resolved
        each_layer = self._passes() + (3 * self._epochs if self._trains else 0)
        tuned = 4 * chosen.end_to_end_epochs if chosen.end_to_end is not EndToEnd.NONE else 0
        product = 2.0 * self._tokens * architecture.active_weights_per_layer
        head = 2.0 * self._tokens * architecture.vocab * architecture.hidden
        moments = architecture.layers * self._moment_flops()
        # the head of the teacher runs as well, and of its own the head takes one gradient
        return architecture.layers * product * (each_layer + tuned) + tuned * head * 3 / 4 + moments

    @property
    def _tokens(self) -> int:
        return self.spec.calibration.samples * self.spec.calibration.length

    @property
    def _epochs(self) -> int:
        return self.spec.trained_epochs

    @property
    def _learns(self) -> bool:
        return self._epochs > 0 and self.spec.resolved != Resolved()

    @property
    def _trains(self) -> bool:
        return self._learns and (self._learns_codes or self._trains_ranges)

    @property
    def _learns_codes(self) -> bool:
        return self.spec.resolved.rounding is not Rounding.NEAREST

    @property
    def _trains_ranges(self) -> bool:
        chosen = self.spec.resolved
        learned = chosen.clipping is Clipping.LEARNED
        return learned or chosen.equivalent_transform or chosen.compensation

    @property
    def _rounds_by_moments(self) -> bool:
        return self._learns and self.spec.resolved.second_order is not SecondOrder.NONE

    def _rounding_bytes(self, layer: int) -> int:
        if not self._rounds_by_moments:
            return 0
        linears = self.architecture.linears_per_layer
        inputs = max(each.in_features for each in linears)
        largest = max(each.weights for each in linears)
        square = MOMENT_COPIES * inputs**2 + LINEAR_COPIES * largest
        return FLOAT_BYTES * square + CHANGED_BYTES * layer + self._forward_bytes()

    def _training_bytes(self, layer: int) -> int:
        if not self._trains:
            return 0
        chosen = self.spec.resolved
        changes = chosen.equivalent_transform or self._rounds_by_moments
        per_weight = (
            TWIN_BYTES + CHANGED_BYTES * changes + (LEARNED_BYTES if self._learns_codes else 0)
        )
        calibration = self.spec.calibration
        windows = min(calibration.batch, calibration.samples)
        tokens = windows * calibration.length
        maps = tokens * calibration.length * self.architecture.heads * MAP_BYTES
        inside = self._inside_bytes(tokens) + (maps if self.device_type != "cpu" else 0)
        return per_weight * layer + inside

    def _forward_bytes(self) -> int:
        length = self.spec.calibration.length
        tokens = length if self.device_type == "cpu" else max(length, CALL_TOKENS)
        return self._inside_bytes(min(tokens, self._tokens))

    def _inside_bytes(self, tokens: int) -> int:
        """About eight hidden and four intermediate activations of every token."""
        sizes = self.architecture
        return tokens * FLOAT_BYTES * (8 * sizes.hidden + 4 * sizes.intermediate)

    def _passes(self) -> int:
        """Forwards of one block over all windows, outside training."""
        chosen, passes = self.spec.resolved, BASE_PASSES
        if not self._learns:
            return passes
        # statistics, the error of what was learned, and of what training started from
        passes += 2 + self._learns_codes + chosen.compares_own
        passes += chosen.equivalent_transform
        if self._rounds_by_moments:
            # four groups of linears, each half a block deep on average
            passes += 4 if chosen.second_order is SecondOrder.GPTAQ else 2
        return passes

    def _moment_flops(self) -> float:
        """Products of inputs with themselves, of linears that are given different ones."""
        if not self._rounds_by_moments:
            return 0.0
        linears = self.architecture.linears_per_layer
        inputs = {each.in_features for each in linears}
        # attention's inputs, its output and the feed-forward's inputs are as wide as the stream
        squares = sum(each**2 for each in inputs) + 2 * self.architecture.hidden**2
        both = 2 if self.spec.resolved.second_order is SecondOrder.GPTAQ else 1
        return 2.0 * both * self._tokens * squares

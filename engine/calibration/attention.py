"""The teacher of attention maps (ABQ-LLM eq. 4): recomputed for each batch, never stored.

Shape legend: B windows of a batch, T tokens, H hidden size, A heads.
"""

import torch

from engine.calibration.block import BlockTask
from engine.errors import SpecError
from engine.methods.losses import map_divergence
from engine.modules.attention import AttentionProbe, SeenAttention
from engine.spec import FULL_BITS

__all__ = ["AttentionTeacher"]


class AttentionTeacher:
    """Compares the maps of a student with those of the full-precision block."""

    def __init__(self, task: BlockTask) -> None:
        self._task = task

    def divergence(self, student: AttentionProbe, full_inputs: torch.Tensor) -> torch.Tensor:
        """Compare maps: a scalar, differentiable in what the student did.

        Args:
            student: was active during the student's forward.
            full_inputs: ``[B, T, H]`` of the full-precision chain.

        Raises:
            SpecError: if the family's attention is computed elsewhere.
        """
        teacher = AttentionProbe()
        with torch.no_grad(), teacher:
            self._task.call.run(self._task.block, full_inputs, FULL_BITS)
        full, quant = _seen(teacher), _seen(student)
        windows = [
            map_divergence(
                full.log_probabilities(each), quant.log_probabilities(each), full.mask_of(each)
            )
            for each in range(len(full.query))
        ]
        return torch.stack(windows).mean()


def _seen(probe: AttentionProbe) -> SeenAttention:
    if probe.seen is None:
        raise SpecError(
            "ingredients.attention_loss", "on", "this family computes its maps elsewhere; use 0"
        )
    return probe.seen

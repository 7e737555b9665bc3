"""The guides of the sequences of a batch: a matcher a slot, and its mask on the device.

Shape legend: S slots, V vocabulary, W = V / 32 words rounded up.
"""

from collections.abc import Iterable, Sequence

import torch

from engine.errors import GuideFailed
from engine.inference.guides import GuideCompiler, GuideMatcher
from engine.inference.sampling_params import Guide

__all__ = ["ANYTHING", "SlotGuides"]

ANYTHING = -1
"""A word of a mask that allows its 32 tokens."""


class SlotGuides:
    """Follows guides on the host and sends their masks."""

    def __init__(self, masks: torch.Tensor, compiler: GuideCompiler | None) -> None:
        """No slot has a guide.

        Args:
            masks: int32, at least ``[S, W]``, on the device: bit 1 for a token that may be drawn.
            compiler: None where no request may have a guide.
        """
        self._masks = masks
        self._compiler = compiler
        self._matchers: dict[int, GuideMatcher] = {}
        self._failures: dict[int, GuideFailed] = {}
        # a row is written again when the draw that used it was waited for
        self._rows = torch.zeros(masks.shape, dtype=torch.int32, pin_memory=masks.is_cuda)

    def open(self, slot: int, guide: Guide, drawn_ids: Sequence[int]) -> None:
        """Begin to follow a guide.

        Args:
            slot: of the sequence.
            guide: as `GuideCompiler.check` found possible.
            drawn_ids: of the answer so far.

        Raises:
            ValueError: if there is no compiler.
            RequestInvalid: if the guide cannot be followed.
            GuideFailed: if the answer so far does not follow it.
        """
        if self._compiler is None:
            raise ValueError(f"guide = {guide.kind.value}: the sampler was made without guides")
        matcher = self._compiler.start(guide)
        for token_id in drawn_ids:
            matcher.accept(token_id)
        self._matchers[slot] = matcher

    def close(self, slot: int) -> None:
        """Forget the guide of a slot, if it has one."""
        self._matchers.pop(slot, None)
        self._failures.pop(slot, None)

    def send(self, slots: Iterable[int]) -> None:
        """Send the masks of those of these slots that have a guide, ahead of their draw.

        A guide that fails allows nothing, so its row draws -1.
        """
        for slot in slots:
            if (matcher := self._matchers.get(slot)) is not None:
                row = self._rows[slot]
                try:
                    matcher.fill(row)
                except GuideFailed as failure:
                    row.zero_()
                    self._failures.setdefault(slot, failure)
                self._masks[slot].copy_(row, non_blocking=True)

    def accept(self, slot: int, token_ids: Sequence[int]) -> GuideFailed | None:
        """Go on by tokens that a slot drew, if it has a guide; -1 is the end of it.

        Returns:
            Why its guide allowed nothing, where it drew -1 for that.
        """
        if (matcher := self._matchers.get(slot)) is None:
            return None
        if min(token_ids, default=-1) < 0:
            return self._failures.get(slot)
        try:
            for token_id in token_ids:
                matcher.accept(token_id)
        except GuideFailed as failure:
            # it allows nothing from here on
            self._failures[slot] = failure
        return None

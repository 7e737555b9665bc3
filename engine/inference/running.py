"""Sequences that have slots and pages; no tensors."""

from bisect import insort

from engine.inference.limits import RunnerShape, SchedulerLimits
from engine.inference.pages import PagePool, pages_for
from engine.inference.planning import StepBuilder
from engine.inference.prefix_cache import PrefixCache
from engine.inference.sequence import SequenceState, TokenSequence
from engine.inference.slots import SlotTable
from engine.inference.statistics import SchedulerCounts
from engine.inference.waiting import WaitingLine

__all__ = ["RunningSet"]


class RunningSet:
    """Gives slots and pages to sequences and takes them back."""

    def __init__(
        self,
        shape: RunnerShape,
        limits: SchedulerLimits,
        line: WaitingLine,
        counts: SchedulerCounts,
        received: int,
    ) -> None:
        """Nothing runs.

        Args:
            shape: of the runner.
            limits: of the scheduler.
            line: where preempted sequences go.
            counts: to add to.
            received: number of the last step of which the result is known.
        """
        self.cache = PrefixCache(PagePool(shape.pages), is_enabled=limits.is_prefix_cached)
        self.slots = SlotTable(shape.max_sequences, received)
        self.page_size = shape.page_size
        self.sequences: list[TokenSequence] = []
        """In order of arrival."""
        self._line = line
        self._counts = counts

    def start(self, sequence: TokenSequence) -> bool:
        """Give a slot to a sequence if all its tokens find pages beside those that run."""
        size = self.page_size
        found = self.cache.find(sequence.digests(size)[: sequence.matchable // size])
        cost = pages_for(sequence.extent, size) - self.cache.held_among(found)
        if self.sequences and cost > self._spare_pages():
            return False
        self.cache.hold(found)
        if sequence.tenure == 0:
            if sequence.score_top is None:
                self._counts.prefix_queries += len(sequence.prompt_ids)
            self._counts.prefix_hits += len(found) * size
            self._counts.prompt_tokens += len(sequence.prompt_ids)
        sequence.start(self.slots.take(), found, len(found) * size)
        insort(self.sequences, sequence, key=lambda each: each.order)
        return True

    def make_room(
        self, sequence: TokenSequence, tokens: int, step: StepBuilder, *, gives_way: bool
    ) -> bool:
        """Give a sequence the pages for its first `tokens` tokens, preempting younger ones.

        Args:
            sequence: it runs, and is not in the step yet.
            tokens: how many its pages are to hold.
            step: sequences in it keep their pages.
            gives_way: whether the sequence itself is preempted where it is the youngest.

        Returns:
            Whether it has them.
        """
        missing = sequence.missing_pages(tokens, self.page_size)
        while self.cache.available < missing:
            victim = self._youngest(sequence, step)
            if victim is not sequence or gives_way:
                self._preempt(victim)
            if victim is sequence:
                return False
        self.take_pages(sequence, missing)
        return True

    def take_pages(self, sequence: TokenSequence, count: int) -> None:
        """Give a sequence pages that are available."""
        if count:
            # the tuple is made anew only here: by it a runner sees that nothing changed
            sequence.pages += tuple(self.cache.take() for _ in range(count))

    def reach(self, sequence: TokenSequence) -> int:
        """How many tokens the sequence's pages could hold without anybody preempted."""
        return (len(sequence.pages) + self.cache.available) * self.page_size

    def publish(self, sequence: TokenSequence) -> None:
        """Let others find the whole pages of a running sequence, whose steps are all launched."""
        whole = min(sequence.computed, len(sequence.tokens)) // self.page_size
        if whole > sequence.published:
            digests = sequence.digests(self.page_size)
            for place in range(sequence.published, whole):
                self.cache.publish(sequence.pages[place], digests[place])
            sequence.published = whole
        if sequence.computed >= len(sequence.prompt_ids):
            sequence.has_shared_prompt = True

    def leave(self, sequence: TokenSequence, state: SequenceState, *, publishes: bool) -> None:
        """Take slot and pages from a running sequence."""
        if publishes:
            self.publish(sequence)
        self.cache.release(sequence.pages)
        self.slots.give_up(sequence.slot, sequence.last_step)
        self.sequences.remove(sequence)
        sequence.leave(state)

    def _preempt(self, sequence: TokenSequence) -> None:
        self._counts.preemptions += 1
        self.leave(sequence, SequenceState.WAITING, publishes=True)
        self._line.put_back(sequence)

    def _youngest(self, sequence: TokenSequence, step: StepBuilder) -> TokenSequence:
        """The youngest sequence that is not in the step; at worst the given one."""
        for each in reversed(self.sequences):
            if each is sequence or not step.has(each):
                return each
        raise AssertionError("a sequence that makes room does not run")

    def _spare_pages(self) -> int:
        """Pages beyond what running prompts still need, and one for each that runs."""
        reserved = sum(each.missing_pages(each.extent, self.page_size) for each in self.sequences)
        return self.cache.available - reserved - len(self.sequences)

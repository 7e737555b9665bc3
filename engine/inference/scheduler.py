"""Which sequence computes what in the next step: continuous batching; no tensors.

Decoding sequences come first, then chunks of prompts, within a number of tokens. A step may be
planned while the one before still runs. Where pages run out the youngest sequence gives its pages
up and is computed anew later, so the oldest always gets on.
"""

from collections.abc import Sequence

from engine.errors import EngineOverloaded
from engine.inference.limits import RunnerShape, SchedulerLimits
from engine.inference.planning import PlannedStep, StepBuilder
from engine.inference.prompts import plan_prompts
from engine.inference.running import RunningSet
from engine.inference.sequence import SequenceState, TokenSequence
from engine.inference.statistics import SchedulerCounts
from engine.inference.steps import Drawn, StepResult
from engine.inference.waiting import WaitingLine

__all__ = ["Scheduler"]


class Scheduler:
    """All sequences that wait or run; one thread at a time."""

    def __init__(self, shape: RunnerShape, limits: SchedulerLimits) -> None:
        if limits.max_step_tokens <= shape.max_sequences:
            raise ValueError(
                f"max_step_tokens = {limits.max_step_tokens} leaves no room for prompts beside"
                f" {shape.max_sequences} sequences; use more than that"
            )
        self.counts = SchedulerCounts()
        self._shape = shape
        self._limits = limits
        self._line = WaitingLine()
        self._arrivals = 0
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """Forget pages, slots and running sequences, as after a fault; what waits still does."""
        self._running = RunningSet(
            self._shape, self._limits, self._line, self.counts, self._steps - 1
        )
        self._advanced: tuple[TokenSequence, ...] = ()

    @property
    def running(self) -> tuple[TokenSequence, ...]:
        """Sequences with a slot, in order of arrival."""
        return tuple(self._running.sequences)

    @property
    def waiting(self) -> int:
        """How many sequences wait, preempted ones too."""
        return len(self._line)

    @property
    def usage(self) -> float:
        """Part of the pages that running sequences hold, 0 to 1."""
        return self._running.cache.usage

    def add(self, sequences: Sequence[TokenSequence]) -> None:
        """Let the sequences of a request wait.

        Raises:
            EngineOverloaded: if too much waits already; none of them waits then.
        """
        running = len(self._running.sequences)
        waiting = len(self._line) + len(sequences) - (self._shape.max_sequences - running)
        is_idle = not running and not len(self._line)
        if not is_idle and waiting > self._limits.max_waiting:
            raise EngineOverloaded("requests", waiting, self._limits.max_waiting)
        tokens = self._line.prompt_tokens + sum(len(each.prompt_ids) for each in sequences)
        if len(self._line) and tokens > self._limits.max_waiting_tokens:
            raise EngineOverloaded("prompt tokens", tokens, self._limits.max_waiting_tokens)
        for sequence in sequences:
            sequence.order = self._arrivals
            self._arrivals += 1
            self._line.append(sequence)

    def plan(self) -> PlannedStep | None:
        """Plan the next step, to be launched before any other call; None if nothing can be done.

        Slots of `take_closed` are to be closed first, then those of `started` opened.
        """
        for sequence in self._advanced:
            if sequence.state is SequenceState.RUNNING:
                self._running.publish(sequence)
        step = StepBuilder(self._steps, self._limits.max_step_tokens)
        self._plan_decodes(step)
        plan_prompts(step, self._running, self._line)
        planned = step.build()
        self._advanced = () if planned is None else planned.sequences
        self._steps += planned is not None
        return planned

    def receive(
        self, planned: PlannedStep, result: StepResult
    ) -> list[tuple[TokenSequence, Drawn]]:
        """Take the result of the oldest launched step; returns what each live sequence won."""
        won: list[tuple[TokenSequence, Drawn]] = []
        owners = zip(planned.plan.steps, planned.sequences, planned.tenures, strict=True)
        for step, sequence, tenure in owners:
            if not (step.draws or step.score_ids):
                continue
            drawn = result.drawn[step.slot]
            if sequence.state is SequenceState.FINISHED or sequence.tenure != tenure:
                self.counts.discarded_tokens += len(drawn.token_ids)
                continue
            won.append((sequence, drawn))
            # a sequence preempted meanwhile keeps what it won, but its pages are gone
            sequence.scored += len(drawn.scores)
            if not step.draws:
                continue
            accepted = len(drawn.token_ids) - 1
            self.counts.drafts_accepted += accepted
            sequence.tokens += drawn.token_ids
            if sequence.state is SequenceState.RUNNING:
                sequence.computed += accepted
                sequence.pending -= 1
        self._running.slots.receive(planned.number)
        return won

    def finish(self, sequence: TokenSequence, *, is_sound: bool = True) -> None:
        """End a sequence; a step that still runs for it is computed in vain.

        Args:
            sequence: in any state.
            is_sound: whether others may use what its pages hold.
        """
        match sequence.state:
            case SequenceState.RUNNING:
                self._running.leave(sequence, SequenceState.FINISHED, publishes=is_sound)
            case SequenceState.WAITING:
                self._line.remove(sequence)
                sequence.leave(SequenceState.FINISHED)
            case SequenceState.FINISHED:
                pass

    def take_closed(self) -> list[int]:
        """Slots that came free and are in no launched step any more; gives each once."""
        return self._running.slots.take_closed()

    def _plan_decodes(self, step: StepBuilder) -> None:
        decoding = [each for each in self._running.sequences if each.is_decoding and each.is_ready]
        for place, sequence in enumerate(decoding):
            # an older one may have taken its pages by now
            if sequence.state is not SequenceState.RUNNING:
                continue
            if not self._running.make_room(sequence, sequence.computed + 1, step, gives_way=True):
                continue
            if not sequence.draft_tokens:
                step.add(sequence, (), draws=True)
                continue
            guesses = self._guess(sequence, step.left - (len(decoding) - place))
            token_ids = (sequence.tokens[-1], *guesses)
            step.add(sequence, token_ids, draws=True, drafts=len(guesses))

    def _guess(self, sequence: TokenSequence, limit: int) -> tuple[int, ...]:
        """Drafts that find pages without anybody preempted."""
        # one more token comes before them
        fitting = self._running.reach(sequence) - sequence.computed - 1
        guesses = sequence.guess(min(limit, fitting))
        missing = sequence.missing_pages(
            sequence.computed + 1 + len(guesses), self._shape.page_size
        )
        self._running.take_pages(sequence, missing)
        self.counts.drafts_proposed += len(guesses)
        return guesses

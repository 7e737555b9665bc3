"""The engine that answers many requests at once: continuous batching over one runner."""

import secrets
import time
from collections.abc import Callable, Sequence

from engine.inference.admission import (
    check_ids,
    check_scored,
    check_together,
    fitting_tokens,
    refuse_guide,
)
from engine.inference.answer import Answer
from engine.inference.limits import RunnerShape, SchedulerLimits
from engine.inference.request import GenerationRequest
from engine.inference.sampling_params import Guide
from engine.inference.scheduler import Scheduler
from engine.inference.score_ticket import ScoreTicket
from engine.inference.sequence import TokenSequence
from engine.inference.statistics import EngineStatistics
from engine.inference.step_loop import StepLoop
from engine.inference.steps import Runner, TokenLogprobs
from engine.inference.text import TextCodec
from engine.inference.ticket import ChunkQueue, ChunkStream, Delivery, Ticket, never_cancelled
from engine.inference.ticket_book import TicketBook

__all__ = ["BatchingEngine"]

SEED_BITS = 64


class BatchingEngine:
    """One loaded model that answers requests from many threads, in common steps."""

    def __init__(
        self,
        runner: Runner,
        text: TextCodec,
        *,
        limits: SchedulerLimits | None = None,
        reopen: Callable[[], Runner] | None = None,
        draft_tokens: int = 0,
        check_guide: Callable[[Guide], None] | None = None,
    ) -> None:
        """Start to serve.

        Args:
            runner: the engine's alone from now on.
            text: of the same checkpoint.
            limits: of steps and queues.
            reopen: makes a runner of the same shape after a fault; without it a fault ends the
                engine.
            draft_tokens: guesses a step for greedy requests that do not say; 0 for none.
            check_guide: refuses a guide that cannot be followed; without it all are refused.
        """
        self.text = text
        self.memory_bytes = runner.memory_bytes
        self._shape = RunnerShape.of(runner)
        self.context_length = min(runner.context_length, self._shape.cache_tokens)
        self._draft_tokens = draft_tokens
        self._check_guide = check_guide or refuse_guide
        self._limits = limits or SchedulerLimits()
        self._scheduler = Scheduler(self._shape, self._limits)
        self._book = TicketBook(self._scheduler)
        self._loop = StepLoop(runner, self._book, reopen)

    def generate(
        self, request: GenerationRequest, is_cancelled: Callable[[], bool] = never_cancelled
    ) -> ChunkStream:
        """See `InferenceEngine.generate`; chunks of several answers come mixed.

        Args:
            request: taken at once, before anything is read.
            is_cancelled: asked in every step, in the engine's thread.
        """
        arrived = ChunkQueue()
        return ChunkStream(arrived, self.submit(request, arrived.put, is_cancelled))

    def submit(
        self,
        request: GenerationRequest,
        deliver: Delivery,
        is_cancelled: Callable[[], bool] = never_cancelled,
    ) -> Ticket:
        """Take a request for a caller that has no thread to wait in.

        Args:
            request: as for `generate`.
            deliver: gets every chunk, `request.n` of which have a finish reason, or an error last.
            is_cancelled: asked in every step, in the engine's thread.

        Raises:
            ContextLengthExceeded: if prompt and completion never fit context or cache.
            RequestInvalid: if a token id is not in the vocabulary, or a guide cannot be followed.
            EngineOverloaded: if as much waits as may.
            EngineError: if the engine was closed, by a fault or on demand.
        """
        check_ids(request, self._shape.vocabulary)
        if request.guide is not None:
            self._check_guide(request.guide)
        max_tokens = fitting_tokens(request, self._shape.context_length, self._shape.cache_tokens)
        answers = {
            sequence: Answer(request, max_tokens, self.text)
            for sequence in self._sequences(request, max_tokens)
        }
        ticket = Ticket(answers, deliver, is_cancelled, time.monotonic())
        self._loop.submit(ticket)
        return ticket

    def check_together(self, requests: Sequence[GenerationRequest]) -> None:
        """Refuse several requests that never find room at one time, however little else runs.

        Args:
            requests: to be submitted one behind the other, with equal `n`.

        Raises:
            RequestInvalid: naming `n`, or the prompt.
        """
        check_together(
            requests,
            answers=self._shape.max_sequences + self._limits.max_waiting,
            tokens=self._limits.max_waiting_tokens,
        )

    def score_prompt(
        self,
        prompt_ids: Sequence[int],
        top: int,
        is_cancelled: Callable[[], bool],
        *,
        tenant: str = "",
        cache_salt: str | None = None,
    ) -> tuple[TokenLogprobs | None, ...]:
        """See `engine.inference.scoring.PromptScorer.score_prompt`."""
        request = GenerationRequest(
            prompt_ids=tuple(prompt_ids), logprobs=top, tenant=tenant, cache_salt=cache_salt
        )
        check_ids(request, self._shape.vocabulary)
        check_scored(request, self._shape.context_length, self._shape.cache_tokens)
        if len(request.prompt_ids) == 1:
            self._loop.check_open()
            return (None,)
        sequence = TokenSequence.to_be_scored(
            request.prompt_ids, top, tenant=tenant, salt=_salt_of(request)
        )
        # hashed in the caller's thread, as for answers
        sequence.digests(self._shape.page_size)
        ticket = ScoreTicket(sequence, is_cancelled)
        self._loop.submit(ticket)
        return ticket.wait()

    @property
    def end(self) -> str | None:
        """Why nothing is answered any more; None while the engine is usable."""
        return self._loop.end

    def statistics(self) -> EngineStatistics:
        """Take a snapshot; also of a closed engine."""
        with self._book.changed:
            counts, clock = self._scheduler.counts, self._loop.clock
            return EngineStatistics(
                running=len(self._scheduler.running),
                waiting=self._scheduler.waiting,
                kv_usage=self._scheduler.usage,
                prefix_queries=counts.prefix_queries,
                prefix_hits=counts.prefix_hits,
                preemptions=counts.preemptions,
                prompt_tokens=counts.prompt_tokens,
                generation_tokens=self._book.delivered,
                discarded_tokens=counts.discarded_tokens,
                drafts_proposed=counts.drafts_proposed,
                drafts_accepted=counts.drafts_accepted,
                faults=self._loop.faults,
                steps=clock.steps,
                step_s=clock.step_s,
                last_step_s=clock.last_step_s,
                beat_age_s=time.monotonic() - clock.beat_s,
            )

    def close(self) -> None:
        """See `InferenceEngine.close`."""
        self._loop.close()

    def _sequences(self, request: GenerationRequest, max_tokens: int) -> list[TokenSequence]:
        """One for each answer; all but the first wait for the pages of the prompt."""
        seed = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
        drafts = self._draft_tokens if request.draft_tokens is None else request.draft_tokens
        sequences = [
            TokenSequence(
                request.prompt_ids,
                request.sampling(_signed(seed + index), self.text.eos_ids),
                max_tokens,
                tenant=request.tenant,
                salt=_salt_of(request),
                draft_tokens=drafts,
            )
            for index in range(request.n)
        ]
        # hashed in the caller's thread: the engine's has a step to plan
        sequences[0].digests(self._shape.page_size)
        for follower in sequences[1:]:
            follower.follow(sequences[0])
        return sequences


def _salt_of(request: GenerationRequest) -> str:
    """The two kinds never meet."""
    if request.cache_salt is not None:
        return f"salt {request.cache_salt}"
    return f"tenant {request.tenant}"


def _signed(seed: int) -> int:
    """Wrap around to 64 bits with a sign, as seeds of requests have."""
    half = 1 << (SEED_BITS - 1)
    return (seed + half) % (2 * half) - half

"""One prompt and its growing answer, as the scheduler sees them; no tensors.

    tokens     known ones: the prompt, then what was drawn
    computed   how many have keys and values in the pages once all launched steps are done
    pending    tokens that launched steps draw and that are not known yet
    scored     tokens of the prompt, from its second, whose scores are known
    waiting, running, finished; preempted ones wait again and are computed anew, drawn tokens too

A sequence is either continued or scored. A scored one computes all of its prompt but the last
token, behind which nothing is scored.

A pending token is computed by its value on the device, so `computed` may exceed the known tokens.
"""

from enum import StrEnum
from typing import Self

from engine.inference.drafts import NgramDrafts
from engine.inference.pages import pages_for
from engine.inference.prefix_cache import extend_digests, root_digest
from engine.inference.sampling_params import SamplingParams

__all__ = ["SequenceState", "TokenSequence"]


class SequenceState(StrEnum):
    """Where a sequence is."""

    WAITING = "waiting"
    """It holds no slot and no pages, at first or after a preemption."""
    RUNNING = "running"
    """It has a slot and pages."""
    FINISHED = "finished"
    """It ended or was given up; nothing of it is computed any more."""


class TokenSequence:
    """State that the scheduler alone changes."""

    state = SequenceState.WAITING
    order = -1
    """Place in the order of arrival."""
    slot = -1
    tenure = 0
    """How many slots it has had: tells results of an earlier one apart."""
    last_step = -1
    """Number of the last step that names its slot."""
    pages: tuple[int, ...] = ()
    published = 0
    """How many of its pages were offered to others."""
    has_shared_prompt = False
    """Whether those of the prompt were, once."""
    computed = 0
    pending = 0
    has_drawn_here = False
    """Whether the runner drew the last token for the slot that the sequence has."""
    score_top: int | None = None
    """How many of the likeliest tokens to tell at each position of a scored prompt; None for a
    prompt that is continued."""
    scored = 0
    cached_tokens = 0
    """Tokens of the prompt found in the prefix cache at the first start."""
    leader: "TokenSequence | None" = None
    """A sequence of the same prompt that computes it first, so that its pages are shared."""

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        max_tokens: int,
        *,
        tenant: str = "",
        salt: str = "",
        draft_tokens: int = 0,
    ) -> None:
        """Begin to wait.

        Args:
            prompt_ids: at least one token.
            sampling: of this answer.
            max_tokens: how many may be drawn at most.
            tenant: on whose behalf.
            salt: prompts share pages under equal salts.
            draft_tokens: guesses to verify in a step; taken for 0 unless the answer is greedy and
                plain.
        """
        self.prompt_ids = prompt_ids
        self.tokens: list[int] = list(prompt_ids)
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.tenant = tenant
        self.draft_tokens = draft_tokens if sampling.is_greedy and sampling.is_plain else 0
        self._drafts = NgramDrafts() if self.draft_tokens else None
        self._root = root_digest(salt)
        self._digests: list[bytes] = []

    @classmethod
    def to_be_scored(
        cls, prompt_ids: tuple[int, ...], top: int, *, tenant: str = "", salt: str = ""
    ) -> Self:
        """Begin to wait for the scores of a prompt, of which nothing is drawn.

        Args:
            prompt_ids: at least two tokens.
            top: how many of the likeliest tokens to tell at each position.
            tenant: on whose behalf.
            salt: as for prompts that are continued, which may use the pages.
        """
        sampling = SamplingParams(temperature=0.0, seed=0)
        sequence = cls(prompt_ids, sampling, 0, tenant=tenant, salt=salt)
        sequence.score_top = top
        return sequence

    @property
    def drawn(self) -> int:
        """Tokens drawn and known."""
        return len(self.tokens) - len(self.prompt_ids)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be drawn, or all are scored."""
        return self.known + self.pending - self.computed

    @property
    def known(self) -> int:
        """Known tokens that are computed at some time."""
        return len(self.tokens) - (self.score_top is not None)

    @property
    def to_score(self) -> int:
        """How many of the `remaining` tokens are computed for what they say of the next."""
        if self.score_top is None:
            return 0
        return self.known - max(self.computed, self.scored)

    @property
    def extent(self) -> int:
        """Tokens that find pages before it starts: the known ones, and one that is drawn."""
        return len(self.tokens) + 1 if self.score_top is None else self.known

    @property
    def matchable(self) -> int:
        """Leading tokens whose pages may be those of others."""
        # the last token is always computed, or there would be nothing to draw from; likewise all
        # tokens that are not scored yet
        return len(self.tokens) - 1 if self.score_top is None else self.scored

    @property
    def is_decoding(self) -> bool:
        """Whether all but the token drawn last, in this slot, are computed."""
        return self.remaining == 1 and self.has_drawn_here

    @property
    def is_ready(self) -> bool:
        """Whether the next step can be planned now, and whether there is one."""
        if self.drawn + self.pending >= self.max_tokens:
            return False
        # a guide's mask and a guess need the last token itself
        return not (self.pending and (self.sampling.guide is not None or self.draft_tokens))

    @property
    def may_start(self) -> bool:
        """Whether it need not wait for the pages of its leader."""
        leader = self.leader
        if leader is None or leader.has_shared_prompt:
            return True
        return leader.state is SequenceState.FINISHED

    def follow(self, leader: Self) -> None:
        """Wait until a sequence of the same prompt has computed it."""
        self.leader = leader
        self._digests = list(leader._digests)

    def digests(self, page_size: int) -> list[bytes]:
        """Of all whole pages of known tokens."""
        extend_digests(self._digests, self._root, self.tokens, page_size)
        return self._digests

    def score_ids(self, end: int) -> tuple[int, ...]:
        """Tokens that are scored when the tokens up to `end` are computed next."""
        if self.score_top is None:
            return ()
        return self.prompt_ids[max(self.computed, self.scored) + 1 : end + 1]

    def index_drafts(self) -> None:
        """Take up the prompt for guesses; takes long for a long one."""
        if self._drafts is not None:
            self._drafts.index(self.tokens)

    def guess(self, limit: int) -> tuple[int, ...]:
        """Tokens that may follow, at most `limit`, never so many that the last cannot be drawn."""
        room = min(self.draft_tokens, limit, self.max_tokens - self.drawn - 1)
        if self._drafts is None or room <= 0:
            return ()
        return self._drafts.propose(self.tokens, room)

    def missing_pages(self, tokens: int, page_size: int) -> int:
        """Pages that the first `tokens` tokens need beyond those it has."""
        return max(0, pages_for(tokens, page_size) - len(self.pages))

    def start(self, slot: int, pages: tuple[int, ...], computed: int) -> None:
        """Take a slot, with the pages that the prefix cache has."""
        if self.tenure == 0:
            self.cached_tokens = computed
        self.state = SequenceState.RUNNING
        self.slot, self.pages = slot, pages
        self.tenure += 1
        self.published, self.computed, self.pending = len(pages), computed, 0
        self.has_drawn_here = False

    def leave(self, state: SequenceState) -> None:
        """Give slot and pages up."""
        self.state = state
        self.slot, self.pages = -1, ()
        self.published = self.computed = self.pending = 0

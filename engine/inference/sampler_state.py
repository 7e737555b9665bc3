"""How the tokens of every slot of a batch are drawn, kept on the device.

A slot holds the parameters of one sequence, its seed, the position of its next token, how often it
drew every token, and the mask of its guide. A draw reads rows of logits, finds the slot of each,
and moves positions and counts on; nothing waits for the host and nothing is allocated, so it can
be captured in a CUDA graph. What a row draws depends on its logits and its slot alone, so a
sequence gets the same tokens in every batch, captured or not, and after it was preempted.

Shape legend: R rows of logits, S slots and one for rows that pad a batch, V vocabulary, W = V / 32
words rounded up.
"""

from collections.abc import Iterable, Sequence

import torch

from engine.errors import GuideFailed
from engine.inference.draws import DrawMode, Draws, DrawTables, KernelDraws, TorchDraws
from engine.inference.guides import GuideCompiler
from engine.inference.sampling_params import MAX_BIASES, MAX_ENDS, SamplingParams
from engine.inference.slot_guides import ANYTHING, SlotGuides
from engine.inference.slot_table import SlotTable, send
from kernels.sampling import MAX_VOCABULARY, SamplingRows
from kernels.token_logprobs import RowLogprobs
from kernels.token_rules import IN_PROMPT, MAX_COUNT, WORD_BITS, TokenRules

__all__ = ["SamplerState"]

ROW_COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "position": torch.int64,
}
RULE_COLUMNS = {
    "is_penalized": torch.int32,
    "repetition": torch.float32,
    "presence": torch.float32,
    "frequency": torch.float32,
    "biases": torch.int32,
    "ends": torch.int32,
    "ends_from": torch.int64,
    "is_guided": torch.int32,
}
COLUMNS = ROW_COLUMNS | RULE_COLUMNS | {"is_measured": torch.int32}
IDLE = SamplingParams(temperature=0.0, seed=0)


class SamplerState:
    """Parameters of S sequences and what their draws leave."""

    def __init__(
        self,
        slots: int,
        vocabulary: int,
        device: torch.device | str,
        *,
        rows: int | None = None,
        guides: GuideCompiler | None = None,
        launches: bool | None = None,
    ) -> None:
        """Allocate everything that draws will ever need.

        Args:
            slots: S, sequences at a time.
            vocabulary: V, at most 2^20.
            device: of the logits.
            rows: the most rows of one draw; None takes S.
            guides: None where no request may have a guide.
            launches: run Triton's kernels; None: on a GPU. Without them plain torch answers.
        """
        self.slots, self.vocabulary = slots, vocabulary
        self.pad_slot = slots
        """Of rows that pad a batch."""
        self.rows = rows or slots
        self._device = torch.device(device)
        self._table = SlotTable(slots + 1, COLUMNS, self._device)
        for slot in range(slots + 1):
            self._table.write(slot, _values(IDLE, 0, 0))
        self._rules = self._make_rules()
        self._guides = SlotGuides(self._rules.masks, guides)
        self._draws = self._make_draws(launches=launches)
        self._tokens = torch.zeros(self.rows, dtype=torch.int32, device=self._device)
        self.logprobs = RowLogprobs.empty(self.rows, self._device)
        """Of the last full draw, a row like its tokens; rows that did not ask keep old numbers."""

    @property
    def memory_bytes(self) -> int:
        """What the buffers take on the device."""
        rules = self._rules
        held = (rules.counts, rules.masks, rules.bias_ids, rules.bias_values, rules.end_ids)
        return sum(each.nbytes for each in held) + self._draws.memory_bytes

    def open(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        drawn_ids: Sequence[int] = (),
    ) -> None:
        """Give a slot to a sequence, in order with what runs on the current stream.

        Args:
            slot: below S.
            params: how its tokens are drawn.
            prompt_ids: of the request.
            drawn_ids: tokens of the answer that exist already, where the sequence was preempted;
                the next draws are those it would have had.

        Raises:
            ValueError: if an id is not in the vocabulary, or there are no guides.
            EngineError: if the guide cannot be followed, or not by `drawn_ids`.
        """
        self._check_ids(params, prompt_ids, drawn_ids)
        if params.guide is not None:
            self._guides.open(slot, params.guide, drawn_ids)
        self._table.write(slot, _values(params, len(prompt_ids), len(drawn_ids)))
        if params.is_penalized:
            send(_counts(prompt_ids, drawn_ids, self.vocabulary), self._rules.counts[slot])
        if params.logit_bias:
            ids, values = (torch.tensor(each) for each in zip(*params.logit_bias, strict=True))
            send(ids.int(), self._rules.bias_ids[slot, : len(ids)])
            send(values.float(), self._rules.bias_values[slot, : len(ids)])
        if params.eos_ids:
            ends = torch.tensor(params.eos_ids, dtype=torch.int32)
            send(ends, self._rules.end_ids[slot, : len(ends)])

    def close(self, slot: int) -> None:
        """Forget a sequence; draws that were launched before stay right."""
        self._guides.close(slot)

    def send_guides(self, slots: Iterable[int]) -> None:
        """Send what the guides of these slots allow, before every draw of theirs.

        Args:
            slots: those without a guide are passed over.
        """
        self._guides.send(slots)

    def accept(self, slot: int, token_ids: Sequence[int]) -> GuideFailed | None:
        """Let the guide of a slot, if it has one, go on by the tokens that the host has read.

        Returns:
            Why the guide allowed nothing, where that is why no token was drawn.
        """
        return self._guides.accept(slot, token_ids)

    def draw(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        *,
        full: bool,
        limited: bool = True,
        advance: bool = True,
    ) -> torch.Tensor:
        """Draw a token for every row.

        Args:
            logits: float16, bfloat16 or float32 ``[R, V]``, V contiguous; stays as it is.
            slots: int64 ``[R]`` on the device, each once; `pad_slot` may stand in many rows.
            full: look at penalties, biases, ends held back and guides, and measure logprobs.
            limited: look at top_k, top_p and min_p. Rows without them draw the same either way.
            advance: move positions and counts on. Without it slots may repeat: drafts of a
                greedy sequence are checked so.

        Returns:
            int32 ``[R]``: a view of a buffer that the next draw writes to. -1 where logits are not
            finite or a guide leaves nothing: the request has to fail, and its next step must not
            look -1 up among the embeddings.
        """
        tokens = self._tokens[: len(slots)]
        mode = DrawMode(full=full, limited=limited, advance=advance)
        self._draws.draw(logits, slots, mode, tokens, self.logprobs)
        return tokens

    def _check_ids(
        self, params: SamplingParams, prompt_ids: Sequence[int], drawn_ids: Sequence[int]
    ) -> None:
        # on a GPU such an id would be an illegal access, which ends the process
        biased = [token_id for token_id, _ in params.logit_bias]
        counted = [*prompt_ids, *drawn_ids] if params.is_penalized else []
        named = {"logit_bias": biased, "eos_ids": params.eos_ids, "prompt_ids": counted}
        for field, ids in named.items():
            for token_id in ids:
                if not 0 <= token_id < self.vocabulary:
                    raise ValueError(
                        f"{field}: token {token_id} is beyond the vocabulary of {self.vocabulary}"
                    )

    def _make_rules(self) -> TokenRules:
        slots, device = self.slots + 1, self._device
        words = -(-self.vocabulary // WORD_BITS)
        return TokenRules(
            counts=torch.zeros(slots, self.vocabulary, dtype=torch.int16, device=device),
            bias_ids=torch.zeros(slots, MAX_BIASES, dtype=torch.int32, device=device),
            bias_values=torch.zeros(slots, MAX_BIASES, device=device),
            end_ids=torch.zeros(slots, MAX_ENDS, dtype=torch.int32, device=device),
            masks=torch.full((slots, words), ANYTHING, dtype=torch.int32, device=device),
            position=self._table.column("position"),
            **{name: self._table.column(name) for name in RULE_COLUMNS},
        )

    def _make_draws(self, *, launches: bool | None) -> Draws:
        tables = DrawTables(
            sampling=SamplingRows(**{name: self._table.column(name) for name in ROW_COLUMNS}),
            rules=self._rules,
            is_measured=self._table.column("is_measured"),
        )
        if launches or (launches is None and self._device.type == "cuda"):
            return KernelDraws(
                tables, rows=self.rows, vocabulary=self.vocabulary, device=self._device
            )
        return TorchDraws(tables)


def _values(params: SamplingParams, prompt: int, drawn: int) -> dict[str, float]:
    """Numbers of a slot whose sequence has so many tokens in its prompt and its answer."""
    return {
        "temperature": params.temperature,
        "top_k": min(params.top_k, MAX_VOCABULARY),
        "top_p": params.top_p,
        "min_p": params.min_p,
        "seed": params.seed,
        "position": prompt + drawn,
        "is_penalized": params.is_penalized,
        "repetition": params.repetition_penalty,
        "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
        "biases": len(params.logit_bias),
        "ends": len(params.eos_ids),
        "ends_from": prompt + params.min_tokens,
        "is_guided": params.guide is not None,
        "is_measured": params.logprobs is not None,
    }


def _counts(prompt_ids: Sequence[int], drawn_ids: Sequence[int], vocabulary: int) -> torch.Tensor:
    """Counts of a sequence: int16 ``[V]``."""
    drawn = torch.tensor(drawn_ids, dtype=torch.int64)
    counts = torch.bincount(drawn, minlength=vocabulary).clamp(max=MAX_COUNT)
    counts[torch.tensor(prompt_ids, dtype=torch.int64)] += IN_PROMPT
    return counts.to(torch.int16)

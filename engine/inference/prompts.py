"""Which chunks of which prompts enter a step; no tensors.

Tenants share the step's tokens equally as far as they need them, whether their prompts run or
wait. Within a tenant the oldest prompt comes first. A sequence that finds no pages when its turn
has come keeps all others from starting, so that small prompts do not overtake a large one for ever.
Of a step's tokens few can be scored; they are shared in the same way.
"""

from engine.inference.planning import StepBuilder
from engine.inference.rations import Rations
from engine.inference.running import RunningSet
from engine.inference.sequence import SequenceState, TokenSequence
from engine.inference.waiting import WaitingLine

__all__ = ["plan_prompts"]


def plan_prompts(step: StepBuilder, running: RunningSet, line: WaitingLine) -> None:
    """Fill what decoding sequences leave of a step.

    Args:
        step: to add to; decoding sequences are in it.
        running: sequences with a slot, and those that get one.
        line: sequences that wait.
    """
    # of a prompt that is scored all may be computed while the scores are on their way
    begun = [each for each in running.sequences if each.remaining and not each.is_decoding]
    rations = Rations.of(begun, line if len(running.slots) else (), step)
    _start_waiting(step, running, line, rations)
    _continue_begun(step, running, begun, rations)


def _start_waiting(
    step: StepBuilder, running: RunningSet, line: WaitingLine, rations: Rations
) -> None:
    tokens, scores = rations.tokens.rooms, rations.scores.rooms
    while len(running.slots):
        sequence = line.next(rations.have_room)
        if sequence is None or not running.start(sequence):
            return
        line.admit(sequence)
        step.start(sequence)
        tenant, scores_left = sequence.tenant, step.scores_left
        limit = _fitting(sequence, tokens[tenant], scores[tenant])
        tokens[tenant] -= _add_chunk(step, running, sequence, limit)
        scores[tenant] -= scores_left - step.scores_left


def _continue_begun(
    step: StepBuilder, running: RunningSet, begun: list[TokenSequence], rations: Rations
) -> None:
    tokens, scores = rations.tokens.shares, rations.scores.shares
    left, scores_left = step.left, step.scores_left
    grants: dict[TokenSequence, int] = {}
    for sequence in begun:
        tenant = sequence.tenant
        fitting = min(tokens[tenant], left), min(scores[tenant], scores_left)
        grants[sequence] = granted = _fitting(sequence, *fitting)
        scored = _scored(sequence, granted)
        tokens[tenant] -= granted
        scores[tenant] -= scored
        left -= granted
        scores_left -= scored
    for sequence in begun:
        # an older one may have taken its pages by now
        if sequence.state is not SequenceState.RUNNING:
            continue
        # what others left over, for example since the prefix cache had their prompts
        granted = grants[sequence]
        scored = _scored(sequence, granted)
        count = _fitting(sequence, granted + left, scored + scores_left)
        left -= count - granted
        scores_left -= _scored(sequence, count) - scored
        if count > 0 and running.make_room(sequence, sequence.computed + 1, step, gives_way=False):
            _add_chunk(step, running, sequence, count)


def _fitting(sequence: TokenSequence, tokens: int, scores: int) -> int:
    """How many of its next tokens a sequence can compute, so many of them scored at most."""
    plain = sequence.remaining - sequence.to_score
    # others of its tenant may have more than its share
    return min(sequence.remaining, tokens, plain + max(0, scores))


def _scored(sequence: TokenSequence, count: int) -> int:
    """How many of its next `count` tokens are scored."""
    return max(0, count - (sequence.remaining - sequence.to_score))


def _add_chunk(step: StepBuilder, running: RunningSet, sequence: TokenSequence, limit: int) -> int:
    """Add the next tokens of a sequence, at most `limit`; returns how many."""
    start, known = sequence.computed, sequence.known
    end = min(known, start + limit, running.reach(sequence))
    whole = end - end % running.page_size
    if start < whole and end < known:
        # the next chunk begins with a page then
        end = whole
    running.make_room(sequence, end, step, gives_way=False)
    token_ids = tuple(sequence.tokens[start:end])
    step.add(sequence, token_ids, draws=end == known and sequence.score_top is None)
    return end - start

"""Which chunks of which prompts enter a step; no tensors.

Tenants share the step's tokens equally as far as they need them, whether their prompts run or
wait. Within a tenant the oldest prompt comes first. A sequence that finds no pages when its turn
has come keeps all others from starting, so that small prompts do not overtake a large one for ever.
"""

from collections import Counter
from collections.abc import Mapping

from engine.inference.planning import StepBuilder, share_tokens
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
    begun = [each for each in running.sequences if not each.is_decoding]
    needs = Counter[str]()
    for sequence in begun:
        needs[sequence.tenant] += sequence.remaining
    waiting = Counter(line.demand() if len(running.slots) else {})
    shares = share_tokens(needs + waiting, step.left)
    rooms = {tenant: share - needs[tenant] for tenant, share in shares.items()}
    _start_waiting(step, running, line, rooms)
    _continue_begun(step, running, begun, shares)


def _start_waiting(
    step: StepBuilder, running: RunningSet, line: WaitingLine, rooms: Mapping[str, int]
) -> None:
    rooms = {tenant: room for tenant, room in rooms.items() if room > 0}
    while len(running.slots):
        sequence = line.next(rooms)
        if sequence is None or not running.start(sequence):
            return
        line.admit(sequence)
        step.start(sequence)
        tenant = sequence.tenant
        rooms[tenant] -= _add_chunk(step, running, sequence, rooms[tenant])
        if rooms[tenant] <= 0:
            del rooms[tenant]


def _continue_begun(
    step: StepBuilder,
    running: RunningSet,
    begun: list[TokenSequence],
    shares: dict[str, int],
) -> None:
    grants: dict[TokenSequence, int] = {}
    left = step.left
    for sequence in begun:
        grants[sequence] = min(sequence.remaining, shares[sequence.tenant], left)
        shares[sequence.tenant] -= grants[sequence]
        left -= grants[sequence]
    for sequence in begun:
        # what others left over, for example since the prefix cache had their prompts
        more = min(sequence.remaining - grants[sequence], left)
        left -= more
        # an older one may have taken its pages by now
        if (
            sequence.state is SequenceState.RUNNING
            and grants[sequence] + more > 0
            and running.make_room(sequence, sequence.computed + 1, step, gives_way=False)
        ):
            _add_chunk(step, running, sequence, grants[sequence] + more)


def _add_chunk(step: StepBuilder, running: RunningSet, sequence: TokenSequence, limit: int) -> int:
    """Add the next tokens of a sequence, at most `limit`; returns how many."""
    start, known = sequence.computed, len(sequence.tokens)
    end = min(known, start + limit, running.reach(sequence))
    whole = end - end % running.page_size
    if start < whole and end < known:
        # the next chunk begins with a page then
        end = whole
    running.make_room(sequence, end, step, gives_way=False)
    step.add(sequence, tuple(sequence.tokens[start:end]), draws=end == known)
    return end - start

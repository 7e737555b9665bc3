"""Sequences that wait for a slot: tenants take turns, each tenant's come in order; no tensors."""

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from engine.inference.sequence import TokenSequence

__all__ = ["WaitingLine"]


class WaitingLine:
    """Preempted sequences first, the oldest before the others; then tenant by tenant."""

    def __init__(self) -> None:
        self._preempted: list[TokenSequence] = []
        # the tenant whose turn is next comes first
        self._tenants: OrderedDict[str, deque[TokenSequence]] = OrderedDict()
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._preempted) + sum(len(line) for line in self._tenants.values())

    def __iter__(self) -> Iterator[TokenSequence]:
        yield from self._preempted
        for line in self._tenants.values():
            yield from line

    def append(self, sequence: TokenSequence) -> None:
        """Let a new sequence wait behind those of its tenant."""
        self._tenants.setdefault(sequence.tenant, deque()).append(sequence)
        self.prompt_tokens += len(sequence.prompt_ids)

    def put_back(self, sequence: TokenSequence) -> None:
        """Let a preempted sequence wait in front."""
        insort(self._preempted, sequence, key=lambda each: each.order)
        self.prompt_tokens += len(sequence.prompt_ids)

    def next(self, has_room: Callable[[TokenSequence], bool]) -> TokenSequence | None:
        """The sequence whose turn it is among those that a step has room for; it stays here."""
        for sequence in self._preempted:
            if has_room(sequence):
                return sequence
        for line in self._tenants.values():
            found = next((each for each in line if each.may_start and has_room(each)), None)
            if found is not None:
                return found
        return None

    def remove(self, sequence: TokenSequence) -> None:
        """Forget a sequence that was given up."""
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            line = self._tenants[sequence.tenant]
            line.remove(sequence)
            if not line:
                del self._tenants[sequence.tenant]
        self.prompt_tokens -= len(sequence.prompt_ids)

    def admit(self, sequence: TokenSequence) -> None:
        """Take a sequence out whose turn it was; its tenant's next turn comes last."""
        is_new = sequence not in self._preempted
        self.remove(sequence)
        if is_new and sequence.tenant in self._tenants:
            self._tenants.move_to_end(sequence.tenant)

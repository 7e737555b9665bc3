"""Rows of the runner's buffers: free, taken, or given up while a step still names them."""

__all__ = ["SlotTable"]


class SlotTable:
    """Gives a slot out again only when the results of all steps that name it are known."""

    def __init__(self, slots: int, received: int) -> None:
        """All are free.

        Args:
            slots: how many.
            received: number of the last step of which the result is known.
        """
        self._free = list(reversed(range(slots)))
        self._received = received
        self._cooling: list[tuple[int, int]] = []
        self._closed: list[int] = []

    def __len__(self) -> int:
        """Slots that `take` can give."""
        return len(self._free)

    def take(self) -> int:
        """Give a free slot out."""
        return self._free.pop()

    def give_up(self, slot: int, last_step: int) -> None:
        """Take a slot back that steps up to `last_step` name."""
        self._cooling.append((slot, last_step))
        self.receive(self._received)

    def receive(self, number: int) -> None:
        """Note that the results of steps up to `number` are known."""
        self._received = number
        cold = [slot for slot, last_step in self._cooling if last_step <= number]
        self._cooling = [entry for entry in self._cooling if entry[1] > number]
        self._free += cold
        self._closed += cold

    def take_closed(self) -> list[int]:
        """Slots that came free since the last call."""
        closed, self._closed = self._closed, []
        return closed

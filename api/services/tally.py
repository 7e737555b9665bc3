"""The token counts of one request as they grow."""

from collections.abc import Mapping
from typing import Any

from api.schemas.answers import PromptDetails, Usage

__all__ = ["Tally"]


class Tally:
    """Counts from the records of a generation."""

    def __init__(self) -> None:
        self._prompt = 0
        self._cached = 0
        self._completion: dict[int, int] = {}
        self._total: int | None = None

    def add(self, record: Mapping[str, Any]) -> None:
        """Take over what a record counts."""
        match record["type"]:
            case "start":
                self._prompt = record["prompt_tokens"]
            case "token" | "finish" if "tokens" in record:
                self._completion[record["index"]] = record["tokens"]
            case "end":
                self._prompt = record["prompt_tokens"]
                self._total = record["completion_tokens"]
                self._cached = record.get("cached_tokens", 0)

    @property
    def tokens(self) -> int:
        """Tokens read and generated so far."""
        return self._prompt + self._generated

    def usage(self) -> Usage:
        """The counts as answers show them."""
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._generated,
            total_tokens=self.tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=self._cached),
        )

    @property
    def _generated(self) -> int:
        return sum(self._completion.values()) if self._total is None else self._total

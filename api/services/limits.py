"""What is let in: nothing while the process stops, and of one API key so much at once and a minute.

Requests at once are counted as they come and go. Tokens are an allowance that fills up evenly, a
minute's worth at most. A request is let in while any of it is left and pays when it ends, since
nobody knows before how long an answer gets; who overdraws waits for longer.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from api.errors import InferenceDraining, ServiceError
from api.settings import LimitSettings

__all__ = ["KeyLimits", "RateLimited", "Slot"]

MINUTE_S = 60.0
BUSY_RETRY_S = 1
"""Nobody knows when one of the caller's own requests ends; soon is likely."""


class RateLimited(ServiceError):
    """The API key has as much running as it may, or has used its tokens of this minute."""

    code: ClassVar[str] = "rate_limit_exceeded"
    status: ClassVar[int] = 429


class KeyLimits:
    """The requests and tokens of all keys. Belongs to one event loop."""

    def __init__(
        self, settings: LimitSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self.is_stopping = False
        """Whether the process is about to stop."""

    @property
    def running(self) -> int:
        """Requests of all keys that were let in and have not left."""
        return sum(each.requests for each in self._accounts.values())

    def stop(self) -> None:
        """Let nobody in any more."""
        self.is_stopping = True

    def enter(self, key_id: str) -> "Slot":
        """Let a request in; its slot must be left.

        Raises:
            InferenceDraining: the process is about to stop.
            RateLimited: with `retry_after_s`.
        """
        if self.is_stopping:
            raise InferenceDraining
        account = self._refilled(key_id)
        most = self._settings.key_requests
        if account.requests >= most:
            raise RateLimited(
                f"This key has {most} requests running; wait for one to end.",
                retry_after_s=BUSY_RETRY_S,
            )
        if account.tokens <= 0:
            wait_s = math.ceil((1 - account.tokens) / self._rate)
            raise RateLimited(
                f"This key has used its {self._settings.key_tokens_per_minute} tokens a minute; "
                f"try again in {wait_s} s.",
                retry_after_s=wait_s,
            )
        account.requests += 1
        return Slot(self, key_id)

    def leave(self, key_id: str, tokens: int) -> None:
        """End a request and pay for its tokens."""
        account = self._refilled(key_id)
        account.requests -= 1
        account.tokens -= tokens
        self._forget_idle()

    def _refilled(self, key_id: str) -> "_Account":
        now, most = self._clock(), float(self._settings.key_tokens_per_minute)
        account = self._accounts.setdefault(key_id, _Account(tokens=most, filled_at=now))
        account.tokens = min(most, account.tokens + (now - account.filled_at) * self._rate)
        account.filled_at = now
        return account

    def _forget_idle(self) -> None:
        # an account that is full again by now says nothing
        now = self._clock()
        idle = [
            key_id
            for key_id, each in self._accounts.items()
            if each.requests == 0
            and each.tokens + (now - each.filled_at) * self._rate
            >= self._settings.key_tokens_per_minute
        ]
        for key_id in idle:
            del self._accounts[key_id]

    @property
    def _rate(self) -> float:
        return self._settings.key_tokens_per_minute / MINUTE_S


class Slot:
    """One request that was let in."""

    def __init__(self, limits: KeyLimits, key_id: str) -> None:
        self._limits = limits
        self._key_id = key_id
        self._is_left = False

    def leave(self, tokens: int) -> None:
        """Make room for another request; only the first call counts."""
        if not self._is_left:
            self._is_left = True
            self._limits.leave(self._key_id, tokens)


@dataclass(slots=True, kw_only=True)
class _Account:
    tokens: float
    filled_at: float
    requests: int = 0

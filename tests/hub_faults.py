"""What a fake Hub can be told to do wrong."""

from dataclasses import dataclass
from enum import StrEnum


class Trouble(StrEnum):
    BUSY = "busy"  # 429 with Retry-After: `amount`
    DOWN = "down"  # 503
    REFUSED = "refused"  # 403
    MOVED = "moved"  # 412: the branch has another head
    TRUNCATED = "truncated"  # the body ends after `amount` bytes
    SLOW = "slow"  # `amount` seconds before every chunk
    STALLED = "stalled"  # the body stops after `amount` bytes, the connection stays
    WRONG_ETAG = "wrong_etag"
    NO_RANGE = "no_range"  # answers 200 with the whole file


ANSWERS = {Trouble.BUSY: 429, Trouble.DOWN: 503, Trouble.REFUSED: 403, Trouble.MOVED: 412}


@dataclass
class Fault:
    """What goes wrong with requests whose method and path contain `where`."""

    trouble: Trouble
    where: str
    times: int = 1
    amount: float = 0
    skip: int = 0
    """So many requests pass unharmed before."""

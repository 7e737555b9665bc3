"""Which Hadamard matrices this engine can build, as arithmetic; torch-free.

A Hadamard matrix of order m has entries +1 and -1 and orthogonal rows. An order is built by the
first rule that fits, so its matrix is the same everywhere:

    m = 2^k                              Sylvester: (-1)^popcount(i & j)
    m = q + 1, q prime, q = 3 mod 4      Paley I
    m = 2 (q + 1), q prime, q = 1 mod 4  Paley II
    m = 2 m', m' an order                doubled: kron(H(2), H(m'))

A transform of n channels is `kron(H(p), H(q))` of two orders with p q = n, as equal as they can be,
and where there are none, repeated over blocks of the largest divisor of n that has them.
R. E. A. C. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933).
"""

from enum import StrEnum
from functools import cache
from math import isqrt

__all__ = ["MAX_ORDER", "Construction", "block_of", "construction_of", "factors"]

MAX_ORDER = 512
"""Above this a dense factor would cost more than it saves; all known model sizes stay below."""


class Construction(StrEnum):
    """How the matrix of an order is built."""

    SYLVESTER = "sylvester"
    PALEY_I = "paley_i"
    PALEY_II = "paley_ii"
    DOUBLED = "doubled"


@cache
def construction_of(order: int) -> Construction | None:
    """Tell how the matrix of an order is built; None where no rule fits or it is too large."""
    if not 1 <= order <= MAX_ORDER:
        return None
    if order & (order - 1) == 0:
        return Construction.SYLVESTER
    half = order // 2 - 1
    rules = {
        # a multiple of 4 less one is always 3 mod 4
        Construction.PALEY_I: _is_prime(order - 1),
        Construction.PALEY_II: half % 4 == 1 and _is_prime(half),
        Construction.DOUBLED: construction_of(order // 2) is not None,
    }
    return next((rule for rule, fits in rules.items() if fits and order % 4 == 0), None)


@cache
def factors(n: int) -> tuple[int, int] | None:
    """Split n into two orders ``(p, q)``, p not above q, as equal as they can be.

    576 is 24 * 24, 1536 is 32 * 48, 14336 is 112 * 128; 11008 = 256 * 43 has none.
    """
    for p in range(isqrt(n), 0, -1):
        if n % p == 0 and construction_of(p) and construction_of(n // p):
            return p, n // p
    return None


@cache
def block_of(n: int) -> int:
    """Channels that a transform of n channels mixes: the largest divisor that has `factors`.

    n itself for nearly all models, 256 for 11008, 1 for an odd number, which nothing mixes.
    """
    return next(b for b in range(n, 0, -1) if n % b == 0 and factors(b))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))

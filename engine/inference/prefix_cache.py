"""Pages that hold the beginnings of token sequences, found again by what they hold; no tensors.

    digest(page i)  = BLAKE2b(digest(page i - 1), token ids of page i)
    digest(page -1) = BLAKE2b(salt)

A digest stands for every token from the beginning to the end of its page. Only whole pages are
published, and only once all of their tokens are computed, so a shared page is never written again.
A published page that nobody holds is kept until its room is needed, the longest unused first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from engine.inference.pages import PagePool

__all__ = ["PrefixCache", "extend_digests", "root_digest"]

DIGEST_BYTES = 32


def root_digest(salt: str) -> bytes:
    """Where a chain begins; chains of different salts share nothing."""
    return blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()


def extend_digests(
    digests: list[bytes], root: bytes, token_ids: Sequence[int], page_size: int
) -> None:
    """Append the digests of the whole pages of `token_ids` that `digests` lacks."""
    for page in range(len(digests), len(token_ids) // page_size):
        ids = array("q", token_ids[page * page_size : (page + 1) * page_size])
        parent = digests[-1] if digests else root
        digests.append(blake2b(parent + ids.tobytes(), digest_size=DIGEST_BYTES).digest())


class PrefixCache:
    """Gives out and takes back pages, and remembers what the published ones hold."""

    def __init__(self, pool: PagePool, *, is_enabled: bool = True) -> None:
        self._pool = pool
        self._is_enabled = is_enabled
        self._by_digest: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        # published pages that nobody holds, the longest unused first
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return self._pool.free + len(self._idle)

    @property
    def usage(self) -> float:
        """Part of the pages that sequences hold, 0 to 1."""
        return 1 - self.available / self._pool.size

    def take(self) -> int:
        """Give an available page to one holder, forgetting what it holds if none is free."""
        if not self._pool.free:
            page, _ = self._idle.popitem(last=False)
            del self._by_digest[self._digest_of.pop(page)]
            self._pool.put_back(page)
        return self._pool.take()

    def find(self, digests: Iterable[bytes]) -> tuple[int, ...]:
        """Pages of the longest beginning that is published; changes nothing."""
        found: list[int] = []
        for digest in digests:
            page = self._by_digest.get(digest)
            if page is None:
                break
            found.append(page)
        return tuple(found)

    def held_among(self, pages: Iterable[int]) -> int:
        """How many of some found pages are held by others, so that holding them takes no room."""
        return sum(self._pool.is_held(page) for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """Add a holder to found pages."""
        for page in pages:
            self._idle.pop(page, None)
            self._pool.share(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Let others find a held page of which every token is computed."""
        # where two sequences computed the same tokens, the first page stays the published one
        if self._is_enabled and digest not in self._by_digest and page not in self._digest_of:
            self._by_digest[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Take a holder away from the pages of a sequence, given in order."""
        # the end of a sequence is of use to fewer others than its beginning, so it goes first
        for page in reversed(pages):
            if self._pool.release(page):
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._pool.put_back(page)

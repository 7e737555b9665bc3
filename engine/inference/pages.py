"""KV pages by id, and who holds them; no tensors."""

from collections import deque

__all__ = ["PagePool", "pages_for"]


def pages_for(tokens: int, page_size: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // page_size)


class PagePool:
    """Pages with reference counts; a page that nobody holds is free or kept aside by its owner."""

    def __init__(self, pages: int) -> None:
        self._holders = [0] * pages
        self._free = deque(range(pages))

    @property
    def size(self) -> int:
        """All pages."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Pages that `take` can give."""
        return len(self._free)

    def take(self) -> int:
        """Give a free page to one holder."""
        page = self._free.popleft()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add a holder, also to a page that was kept aside."""
        self._holders[page] += 1

    def release(self, page: int) -> bool:
        """Take a holder away; returns whether it was the last."""
        assert self._holders[page] > 0, f"page {page} is released more often than held"
        self._holders[page] -= 1
        return self._holders[page] == 0

    def put_back(self, page: int) -> None:
        """Make a page free that nobody holds."""
        assert self._holders[page] == 0, f"page {page} is still held"
        self._free.append(page)

    def is_held(self, page: int) -> bool:
        """Whether anybody holds a page."""
        return self._holders[page] > 0

"""The pipe that tells a pool process that its Celery worker is stopping, or was killed.

The worker's main process holds the writing end and cuts it when it shuts down; the kernel cuts it
when the process dies. A pool process, forked from it, sees the end of the pipe either way.
"""

import os
import select
from typing import Self

__all__ = ["Lifeline"]


class Lifeline:
    """One pipe between the worker's main process and its pool processes."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd: int | None = write_fd

    @classmethod
    def open(cls) -> Self:
        """Make the pipe; call it before the pool forks."""
        return cls(*os.pipe())

    def let_go(self) -> None:
        """Close this process's copy of the writing end: in the main process, cut the line.

        Every pool process calls it too, since its own copy would hide the main process's end.
        """
        if self._write_fd is not None:
            fd, self._write_fd = self._write_fd, None
            os.close(fd)

    def is_cut(self) -> bool:
        """True once the main process stops or is gone; meant for pool processes."""
        return self.wait(0.0)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the line is cut or the time is over; True when it is cut."""
        readable, _, _ = select.select([self._read_fd], [], [], timeout_s)
        return bool(readable)

"""Compile ahead in other processes: a compiler fills one core, and a kernel may crash its process.

What the processes compile lands in the caches of Triton and of the rivals on disk, from where the
process that measures takes it. A launch that fails there is never launched here: an illegal access
would end the measurement with it.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import TimeoutError as TimedOutError
from typing import TypeVar

__all__ = ["run_ahead"]

T = TypeVar("T")
R = TypeVar("R")


def run_ahead(
    function: Callable[[T], R], tasks: Sequence[T], *, workers: int, seconds: float
) -> Iterator[R | None]:
    """Run a function over tasks in fresh processes.

    Args:
        function: of a module, so that another process finds it.
        tasks: pickled.
        workers: processes at a time; 0 runs nothing, which leaves every answer None.
        seconds: after which processes are ended.

    Returns:
        Answers in the order of the tasks; None for one that crashed or came too late.
    """
    if not workers or not tasks:
        yield from (None for _ in tasks)
        return
    end = time.monotonic() + seconds
    # a process a task: a crash takes nobody else's context along
    with multiprocessing.get_context("spawn").Pool(
        min(workers, len(tasks)), maxtasksperchild=1
    ) as pool:
        waiting = [pool.apply_async(function, (task,)) for task in tasks]
        for answer in waiting:
            try:
                yield answer.get(timeout=max(0.0, end - time.monotonic()))
            except TimedOutError:
                yield None

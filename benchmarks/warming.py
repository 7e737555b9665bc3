"""Compile ahead in other processes: a compiler fills one core, and a kernel may crash its process.

What the processes compile lands in the caches of Triton and of the rivals on disk, from where the
process that measures takes it. A launch that fails or hangs there is never launched here: an
illegal access or a deadlock would end the measurement with it.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

__all__ = ["describe", "launch_each", "run_ahead", "told_of_each"]

C = TypeVar("C")
T = TypeVar("T")
R = TypeVar("R")
Failures = list[str | None]
"""Of candidates, in their order: what went wrong, or None."""
PATIENCE_S = 75.0
"""Without an answer from anyone: a few compilations take 40 s on a busy machine."""
POLL_S = 0.05


def run_ahead(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    workers: int,
    seconds: float,
    patience_s: float = PATIENCE_S,
) -> list[R | None]:
    """Run a function over tasks in fresh processes, one a task.

    Args:
        function: of a module, so that another process finds it; it answers instead of raising.
        tasks: pickled.
        workers: processes at a time; 0 runs nothing.
        seconds: after which processes are ended.
        patience_s: after the last answer, likewise: what is left hangs or has crashed.

    Returns:
        Answers in the order of the tasks; None for one that crashed, hung or was not run.
    """
    if not workers or not tasks:
        return [None for _ in tasks]
    # a process a task: a crash takes nobody else's context along
    with multiprocessing.get_context("spawn").Pool(
        min(workers, len(tasks)), maxtasksperchild=1
    ) as pool:
        answers = [pool.apply_async(function, (task,)) for task in tasks]
        end, answered, last = time.monotonic() + seconds, 0, time.monotonic()
        while answered < len(answers):
            now, ready = time.monotonic(), sum(each.ready() for each in answers)
            if ready > answered:
                answered, last = ready, now
            if now > min(end, last + patience_s):
                break
            time.sleep(POLL_S)
        return [each.get() if each.ready() else None for each in answers]


def launch_each(candidates: Sequence[C], launch: Callable[[C], object]) -> Failures:
    """Launch candidates in this process, whatever becomes of it, on its GPU.

    Args:
        candidates: one after another.
        launch: raises what it will.
    """
    answers: Failures = []
    for candidate in candidates:
        try:
            launch(candidate)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  a candidate may fail in any way
            answers.append(describe(error))
            if not _is_alive():
                # an illegal access ends the context: the others were not tried
                untried = len(candidates) - len(answers)
                return [*answers, *["not tried after an illegal access"] * untried]
        else:
            answers.append(None)
    return answers


def told_of_each(
    candidates: Sequence[C], answer: Failures | None
) -> Iterator[tuple[C, str | None]]:
    """Candidates of a task with what went wrong, which is time where `run_ahead` has no answer."""
    told = answer or ["no answer in time"] * len(candidates)
    return zip(candidates, told, strict=True)


def describe(error: Exception) -> str:
    """A line for what went wrong."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _is_alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

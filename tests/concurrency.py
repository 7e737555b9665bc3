"""Threads that begin together, for tests of what must happen only once."""

import threading
from concurrent.futures import ThreadPoolExecutor


def run_at_once(*functions):
    """Call every function in a thread of its own, all at the same moment; returns their results.

    The first error of any of them is raised after all have ended.
    """
    start = threading.Barrier(len(functions))

    def begin_together(function):
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(begin_together, function) for function in functions]
    return [future.result() for future in futures]

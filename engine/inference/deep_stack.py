"""A computation that recurses as deep as its input nests, in native code that checks no depth."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["run_on_deep_stack"]

STACK_BYTES = 256 << 20
"""Address space; only what is reached becomes memory."""
STARTING = threading.Lock()
"""The size of a new thread's stack is one number of the whole process."""
T = TypeVar("T")


def run_on_deep_stack(compute: Callable[[], T]) -> T:
    """Call a function in a thread of its own, whose stack is 32 times the usual one.

    Args:
        compute: what it returns or raises comes out here.

    Raises:
        RuntimeError: if the system has no room for such a thread, or native code panics.
    """
    outcome: Future[T] = Future()

    def settle() -> None:
        try:
            outcome.set_result(compute())
        except Exception as error:  # noqa: BLE001  raised again by the caller's thread
            outcome.set_exception(error)
        except BaseException as error:  # noqa: BLE001  a panic of Rust passes for the end of all
            fault = RuntimeError(f"native code failed: {error}")
            fault.__cause__ = error
            outcome.set_exception(fault)

    thread = threading.Thread(target=settle, name="deep-stack", daemon=True)
    with STARTING:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return outcome.result()

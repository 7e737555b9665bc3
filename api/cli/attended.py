"""`python -m api.cli.attended <module>`: run a module that ends when whoever started it is gone.

The starter keeps the other end of standard input open and never writes. The kernel closes it when
the starter dies, whatever it died of, so no process of `abq up` outlives it.
"""

import os
import runpy
import signal
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Run the module named by the first argument; the others are its own."""
    threading.Thread(target=_end_with_starter, name="attended", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_starter() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()

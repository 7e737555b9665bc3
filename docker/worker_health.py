"""Exit code 0 when this container's worker answers over the broker; what its health check runs."""  # noqa: INP001 - a script of the image, not a package

import socket
import sys

from api.queue import create_celery
from api.settings import Settings

ANSWER_S = 3.0


def main() -> int:
    """Ask all workers for a sign of life and look for the one of this host."""
    answers = create_celery(Settings()).control.ping(timeout=ANSWER_S)
    host = f"@{socket.gethostname()}"
    names = [name for answer in answers for name in answer]
    return 0 if any(name.endswith(host) for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())

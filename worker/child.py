"""`python -m worker.child JOB.json`: one calibration in a process of its own.

Events go to standard output, one JSON object a line, and last a `result` or an `error`; logs go
to standard error. The end of standard input means that the supervisor is gone, so the process
ends at once and no orphan keeps the GPU. SIGTERM stops at the next step; finished blocks stay on
disk. No secrets, no network, no settings: everything is in the job file.
"""

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from engine.calibration.watch import Watch
from engine.errors import CalibrationDiverged, CalibrationInterrupted, EngineError
from engine.events import Event, encode_event

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_ORPHANED = 3
EXIT_TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job of a file; the exit status repeats what the last record says."""
    path = Path((sys.argv[1:] if arguments is None else arguments)[0])
    channel = _take_over_stdout()
    watcher = threading.Thread(
        target=_end_with_supervisor, args=(channel,), name="supervisor-watch", daemon=True
    )
    watcher.start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        report = _run(path, channel, stop)
    except CalibrationInterrupted as error:
        channel.write_error(error.code, error.message)
        return EXIT_TERMINATED
    except EngineError as error:
        layer = error.layer if isinstance(error, CalibrationDiverged) else None
        channel.write_error(error.code, error.message, layer)
        return EXIT_FAILED
    except Exception as error:
        if _is_out_of_memory(error) or _is_disk_full(error):
            channel.write_error(*_lack(error))
            return EXIT_FAILED
        # the supervisor records it; the traceback goes to the log
        channel.write_error("engine_error", f"{type(error).__name__}: {error}")
        raise
    channel.write_last({"type": "result", "report": report})
    return 0


class _Channel:
    """The pipe to the supervisor: whole lines, flushed, from any thread."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self.is_final = False
        """True from the moment the last record is on its way."""

    def write_event(self, event: Event) -> None:
        """Write one event."""
        self._write_line(encode_event(event))

    def write_last(self, record: Mapping[str, Any]) -> None:
        """Write the record that says how it ended."""
        self.is_final = True
        self._write_line(json.dumps(record, separators=(",", ":"), allow_nan=False))

    def write_error(self, code: str, message: str, layer: str | None = None) -> None:
        """Write the last record of a job that failed."""
        self.write_last({"type": "error", "code": code, "message": message, "layer": layer})

    def _write_line(self, line: str) -> None:
        with self._lock:
            self._pipe.write(line + "\n")
            self._pipe.flush()


def _run(path: Path, channel: _Channel, stop: threading.Event) -> dict[str, Any]:
    # torch takes seconds to import, and the supervisor may be gone or say stop before it is there
    import torch  # noqa: PLC0415

    from engine.pipeline import QuantJob, quantize_model  # noqa: PLC0415

    record = json.loads(path.read_bytes())
    if record.get("threads"):
        torch.set_num_threads(record["threads"])
    job = QuantJob.from_json(record)
    watch = Watch(on_event=channel.write_event, should_stop=stop.is_set)
    return quantize_model(job, watch).to_json()


def _lack(error: Exception) -> tuple[str, str]:
    """Code and message of what ran out."""
    if _is_disk_full(error):
        # as the worker says it of its own files; the error names paths
        return "disk_full", "the worker's disk is full"
    return "out_of_memory", str(error) or "memory ran out"


def _is_disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_out_of_memory(error: Exception) -> bool:
    # the CPU allocator has no error class of its own, and torch may not have been imported
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _take_over_stdout() -> _Channel:
    """Keep the pipe for records; whatever else prints goes to standard error."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    return _Channel(pipe)


def _end_with_supervisor(channel: _Channel) -> None:
    """Wait for the end of standard input, then leave without a word."""
    while os.read(0, 4096):
        continue
    # a supervisor that has its answer may hang up; the exit status must still repeat it
    if not channel.is_final:
        os._exit(EXIT_ORPHANED)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # all is written; to take torch and transformers apart would keep the GPU for another second
    os._exit(status)

"""Tokens a second of one checkpoint, one request at a time, and memory beside it.

python -m benchmarks.decode CHECKPOINT_DIR --new-tokens 64
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measurement import MEASUREMENTS, write_measurement
from engine.checkpoint.format import spec_of_section
from engine.inference.engine import InferenceEngine, open_engine
from engine.inference.request import GenerationRequest
from engine.models.loading import read_config

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time each checkpoint and write the measurement."""
    options = _parser().parse_args(arguments)
    console = Console()
    rows = []
    for directory in options.checkpoints:
        rows.append(_measure(directory, options))
        console.print(rows[-1])
    console.print(str(write_measurement(options.name, rows, options.out)))


def _measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    spec = spec_of_section(read_config(directory))
    started_s = time.monotonic()
    engine = open_engine(directory, options.device)
    load_s = time.monotonic() - started_s
    try:
        runs = [_time_generation(engine, options) for _ in range(options.repeats + 1)]
    finally:
        engine.close()
    # the first run compiles kernels and fills caches
    first_token_s = statistics.median(run[0] for run in runs[1:])
    per_token_s = statistics.median(run[1] for run in runs[1:])
    return {
        "config": spec.notation,
        "kv_bits": spec.kv_bits,
        "batch": 1,
        "context": options.prompt_tokens,
        "tokens_per_s": round(1 / per_token_s, 2),
        "ms_per_step": round(per_token_s * 1e3, 3),
        "first_token_ms": round(first_token_s * 1e3, 1),
        "memory_gb": round(engine.memory_bytes / 1e9, 4),
        "load_s": round(load_s, 2),
    }


def _time_generation(engine: InferenceEngine, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""
    prompt = tuple(range(10, 10 + options.prompt_tokens))
    request = GenerationRequest(
        prompt_ids=prompt, max_tokens=options.new_tokens, temperature=0, ignore_eos=True
    )
    started_s = time.perf_counter()
    stamps = [time.perf_counter() for _ in engine.generate(request)]
    return stamps[0] - started_s, (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=None)
    parser.add_argument("--name", default="decode")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    return parser


if __name__ == "__main__":
    main()

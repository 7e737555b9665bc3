"""How a kernel is timed: the launches that were checked are the launches that are timed.

1. Launches over weights that rotate through more memory than any L2 holds are captured in one CUDA
   graph, as the runtime launches them; on a CPU they run one after the other.
2. Their outputs are poisoned, the graph is replayed, and every output is checked. A wrong one ends
   it: there is no time of a wrong kernel.
3. The same graph is replayed at least 20 times between events; the median, divided by the launches
   of a graph, is the time of one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

__all__ = ["Method", "Timing", "WrongResultError", "copies_to_rotate", "time_launches"]

Output = torch.Tensor | tuple[torch.Tensor, ...]
Launch = Callable[[int], Any]
"""Runs copy i of the operands and returns the `Output`, allocated by the launch or its own."""
Check = Callable[[Any], bool]
"""Whether an `Output` is right."""


class WrongResultError(Exception):
    """A kernel gave a wrong result, so it has no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How long and over how much memory to measure."""

    rotate_bytes: int = 128 << 20
    """Operands together; an H100's L2 holds 50 MB."""
    replays: int = 24
    graph_us: float = 2000.0
    """A graph holds as many launches as fill this, so that its own start does not count."""
    max_launches: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The time of one launch."""

    us: float
    """Median over replays."""
    spread: float
    """Distance of the quartiles over the median."""
    launches: int
    """In one replay, all of them checked."""


def copies_to_rotate(operand_bytes: int, method: Method) -> int:
    """How many copies of operands of that size fill what no cache holds."""
    return max(2, -(-method.rotate_bytes // max(1, operand_bytes)))


def time_launches(launch: Launch, copies: int, check: Check, method: Method) -> Timing:
    """Check a launch over all copies, then time what was checked.

    Args:
        launch: called with 0 .. copies - 1; capturable by a CUDA graph.
        copies: of the operands.
        check: sees every output once.
        method: sizes and repetitions.

    Raises:
        WrongResultError: if an output is wrong or was not written.
    """
    # compilation, lazy initialization
    device = _tensors(launch(0))[0].device
    if device.type != "cuda":
        return _time_eagerly(launch, copies, check, method)
    torch.cuda.synchronize(device)
    graph, outputs = _capture(launch, copies, copies)
    once_us = _replay_us(graph, 3)[-1]
    launches = min(method.max_launches, copies * max(1, round(method.graph_us / once_us)))
    if launches > copies:
        del graph, outputs
        graph, outputs = _capture(launch, copies, launches)
    _poison(outputs)
    graph.replay()
    torch.cuda.synchronize(device)
    _check_all(outputs, check)
    replays = _replay_us(graph, method.replays)
    # what a launch leaves behind, counters say, must not spoil a later one
    _check_all(outputs[:copies], check)
    return _summarize([us / launches for us in replays], launches)


def _capture(
    launch: Launch, copies: int, launches: int
) -> tuple[torch.cuda.CUDAGraph, list[Output]]:
    graph = torch.cuda.CUDAGraph()
    # outputs that stay alive have memory of their own, and each can be checked
    with torch.cuda.graph(graph):
        outputs = [launch(index % copies) for index in range(launches)]
    return graph, outputs


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    graph.replay()
    events = [_mark()]
    for _ in range(replays):
        graph.replay()
        events.append(_mark())
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairwise(events)]


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
    event.record()
    return event


def _time_eagerly(launch: Launch, copies: int, check: Check, method: Method) -> Timing:
    times = []
    for index in range(max(copies, method.replays)):
        started_s = time.perf_counter()
        output = launch(index % copies)
        times.append((time.perf_counter() - started_s) * 1e6)
        _check_all([output], check)
    return _summarize(times, 1)


def _poison(outputs: Sequence[Output]) -> None:
    for tensor in (each for output in outputs for each in _tensors(output)):
        poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
        tensor.fill_(poison)


def _tensors(output: Output) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _check_all(outputs: Sequence[Output], check: Check) -> None:
    wrong = sum(not check(output) for output in outputs)
    if wrong:
        raise WrongResultError(f"{wrong} of {len(outputs)} outputs are wrong")


def _summarize(times_us: Sequence[float], launches: int) -> Timing:
    low, middle, high = statistics.quantiles(times_us, n=4)
    return Timing(us=middle, spread=(high - low) / middle, launches=launches)

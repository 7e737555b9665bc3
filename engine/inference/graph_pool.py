"""How the CUDA graphs of a runner are recorded, into memory that all of them share.

A smaller graph fits into what the largest left, for only one runs at a time and none reads what
another wrote there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["GraphPool", "capture_graphs"]


class GraphPool:
    """Memory of graphs of one stream."""

    def __init__(self, device: torch.device) -> None:
        """Begin without memory; graphs bring what they need."""
        self.device = device
        self._handle = torch.cuda.graph_pool_handle()

    @contextmanager
    def recorded(self) -> Iterator[torch.cuda.CUDAGraph]:
        """Record what the current stream is given meanwhile, once it has run as it is."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._handle,
            # its libraries have their workspaces already; in another they would be made of the pool
            stream=torch.cuda.current_stream(),
            # another model of the process may allocate meanwhile
            capture_error_mode="thread_local",
        ):
            yield graph


def capture_graphs(device: torch.device, *captures: Callable[[GraphPool], None]) -> int:
    """Capture into one pool, those that take most memory first; returns bytes that it all holds."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info(device)
    pool = GraphPool(device)
    for capture in captures:
        capture(pool)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return max(0, free_before - torch.cuda.mem_get_info(device)[0])

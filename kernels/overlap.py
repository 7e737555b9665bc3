"""Whether a kernel may start before the one ahead of it has ended.

Such a kernel (programmatic dependent launch) prepares what does not depend on the other and then
waits for all that it wrote. As every one of them waits, a third kernel may rely on the first.
"""

from functools import lru_cache

import torch

__all__ = ["can_overlap"]

HOPPER = 9


@lru_cache
def can_overlap(device_index: int | None) -> bool:
    """Whether a GPU has it: from Hopper on."""
    return torch.cuda.get_device_capability(device_index)[0] >= HOPPER

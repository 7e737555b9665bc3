import errno

import pytest
import torch

from worker.child import _is_disk_full, _is_out_of_memory, _lack


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_every_way_to_run_out_of_memory_is_known(error):
    assert _is_out_of_memory(error)


def test_the_cpu_allocators_own_error_is_known():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)

    assert _is_out_of_memory(refused.value)


def test_other_errors_are_no_lack_of_memory():
    assert not _is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_known_and_its_paths_stay_in(number):
    error = OSError(number, "no room", "/srv/secret/block-00000.safetensors")

    assert _is_disk_full(error)
    assert _lack(error) == ("disk_full", "the worker's disk is full")


def test_a_broken_disk_is_no_full_one():
    assert not _is_disk_full(OSError(errno.EIO, "bad block"))

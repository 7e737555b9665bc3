import pytest

from worker.devices import Gpu, choose_gpu, select_visible


def gpu(index, free_bytes=10):
    return Gpu(
        index=index, uuid=f"GPU-{index}abc", name="H100", total_bytes=100, free_bytes=free_bytes
    )


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("GPU-1", [1]),
        ("", []),
        ("-1", []),
        ("0,7,1", [0]),
    ],
)
def test_only_what_the_worker_may_see_is_chosen_from(visible, indexes):
    gpus = [gpu(index) for index in range(3)]

    assert [each.index for each in select_visible(gpus, visible)] == indexes


def test_a_worker_that_may_see_no_gpu_has_none():
    assert choose_gpu("") is None

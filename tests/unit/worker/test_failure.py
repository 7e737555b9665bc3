import errno

import pytest

from api.errors import DiskTooSmall, HubUnavailable, ModelGated
from engine.errors import CheckpointInvalid
from worker.failure import failure_of_error


@pytest.mark.parametrize(
    ("error", "code", "is_transient"),
    [
        (HubUnavailable(), "hub_unavailable", True),
        (ModelGated(), "model_gated", False),
        (DiskTooSmall("no room"), "disk_too_small", False),
        (CheckpointInvalid("no shard"), "checkpoint_invalid", False),
        (OSError(errno.ENOSPC, "no space"), "disk_full", False),
        (OSError(errno.EIO, "bad block"), "internal_error", True),
        (KeyError("index"), "internal_error", True),
    ],
)
def test_only_what_may_pass_by_itself_is_tried_again(error, code, is_transient):
    failure = failure_of_error(error)

    assert (failure.code, failure.is_transient) == (code, is_transient)


def test_a_fault_of_the_worker_tells_its_owner_no_details():
    failure = failure_of_error(PermissionError(errno.EACCES, "denied", "/srv/secret/place"))

    assert failure.to_json() == {
        "code": "internal_error",
        "message": "the worker failed: PermissionError",
        "layer": None,
    }

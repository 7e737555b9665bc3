import pytest

from api.db.repositories.access import get_or_create_tenant
from api.db.repositories.leases import claim_job, fail_job
from api.settings import LimitSettings

DONE = {"code": "done", "message": "over", "layer": None}


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"limits": LimitSettings(active_jobs=1000)})


@pytest.fixture
def tenants(database):
    with database.write() as session:
        return tuple(get_or_create_tenant(session, name).id for name in ("a", "b"))


def claim(database, worker="w"):
    with database.write() as session:
        return claim_job(session, worker=worker, lease_s=60, free_vram_bytes=None)


def end(database, claimed):
    with database.write() as session:
        fail_job(session, claimed.lease, error=DONE, retry=False)


@pytest.mark.parametrize("workers", [1, 3])
def test_two_hundred_jobs_of_one_tenant_delay_another_by_at_most_one_job(
    database, tenants, queue_job, workers
):
    crowd, guest = tenants
    for _ in range(200):
        queue_job(crowd)
    busy = [claim(database, f"w{number}") for number in range(workers)]
    end(database, busy.pop(0))
    busy.append(claim(database, "w0"))

    wanted = queue_job(guest)

    end(database, busy.pop(0))
    assert claim(database, "w1").job.id == wanted.id


def test_two_tenants_with_full_queues_take_turns_on_one_worker(database, tenants, queue_job):
    for tenant in tenants:
        for _ in range(4):
            queue_job(tenant)

    served = []
    for _ in range(8):
        claimed = claim(database)
        served.append(claimed.job.tenant_id)
        end(database, claimed)

    assert served == list(tenants) * 4


def test_a_tenant_with_a_running_job_waits_behind_one_without(database, tenants, queue_job):
    crowd, guest = tenants
    queue_job(guest)
    first = claim(database, "w1")
    end(database, first)
    for _ in range(2):
        queue_job(crowd)
    claim(database, "w1")
    wanted = queue_job(guest)

    assert claim(database, "w2").job.id == wanted.id

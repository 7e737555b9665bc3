from datetime import timedelta

import pytest

from api.db.base import new_id
from api.db.connection import database_now
from api.db.repositories import access, artifacts
from api.db.repositories.leases import claim_job, complete_job
from api.db.repositories.pages import Cursor
from api.db.tables.access import ApiKey
from api.db.tables.artifacts import Artifact, ArtifactFile, Deployment
from api.errors import (
    ArtifactNotFound,
    DeploymentConflict,
    DeploymentNotFound,
    FileNotInArtifact,
    KeyNotFound,
)


@pytest.fixture
def other_tenant(database):
    with database.write() as session:
        return access.get_or_create_tenant(session, "other").id


@pytest.fixture
def artifact(database, queue_job):
    job = queue_job()
    made = Artifact(
        id=new_id("art"),
        tenant_id=job.tenant_id,
        job_id=job.id,
        manifest_sha256="a" * 64,
        bytes=5 << 40,
        bits_per_weight=4.1,
        summary={},
        created_at=job.created_at,
    )
    files = [
        ArtifactFile(artifact_id=made.id, path=path, bytes=1, sha256="b" * 64)
        for path in ("tokenizer.json", "config.json")
    ]
    with database.write() as session:
        claimed = claim_job(session, worker="w", lease_s=60, free_vram_bytes=None)
        complete_job(session, claimed.lease, report={}, artifact=made, files=files)
    return made


def deployment(database, artifact, name="chat", tenant_id=None):
    with database.read() as session:
        now = database_now(session)
    return Deployment(
        id=new_id("dep"),
        tenant_id=tenant_id or artifact.tenant_id,
        artifact_id=artifact.id,
        name=name,
        created_at=now,
    )


def deploy(database, artifact, name="chat", tenant_id=None):
    wanted = deployment(database, artifact, name, tenant_id)
    with database.write() as session:
        artifacts.insert_deployment(session, wanted)
    return wanted


def test_an_artifact_larger_than_32_bits_is_read_with_its_files_by_path(database, artifact):
    with database.read() as session:
        read = artifacts.get_artifact(session, artifact.tenant_id, artifact.id)
        of_job = artifacts.artifact_of_job(session, artifact.tenant_id, artifact.job_id)
        files = artifacts.list_files(session, artifact.id)
        file = artifacts.get_file(session, artifact.id, "config.json")

    assert read.bytes == 5 << 40
    assert of_job.id == artifact.id
    assert [each.path for each in files] == ["config.json", "tokenizer.json"]
    assert file.sha256 == "b" * 64


@pytest.mark.parametrize("path", ["missing", "../config.json", "config.json/", ""])
def test_only_a_files_exact_path_finds_it(database, artifact, path):
    with database.read() as session, pytest.raises(FileNotInArtifact):
        artifacts.get_file(session, artifact.id, path)


def test_another_tenants_artifact_and_deployment_are_as_if_they_did_not_exist(
    database, artifact, other_tenant
):
    hosted = deploy(database, artifact)

    with database.write() as session:
        for look, error in (
            (lambda: artifacts.get_artifact(session, other_tenant, artifact.id), ArtifactNotFound),
            (
                lambda: artifacts.artifact_of_job(session, other_tenant, artifact.job_id),
                ArtifactNotFound,
            ),
            (lambda: artifacts.find_deployment(session, other_tenant, "chat"), DeploymentNotFound),
            (
                lambda: artifacts.delete_deployment(session, other_tenant, hosted.id),
                DeploymentNotFound,
            ),
        ):
            with pytest.raises(error):
                look()
        assert artifacts.list_deployments(session, other_tenant).items == []


def test_a_name_is_taken_once_a_tenant(database, artifact, other_tenant):
    deploy(database, artifact)

    with pytest.raises(DeploymentConflict):
        deploy(database, artifact)

    deploy(database, artifact, tenant_id=other_tenant)
    deploy(database, artifact, name="chat-2")


def test_a_refused_name_does_not_undo_the_rest_of_the_transaction(database, artifact):
    deploy(database, artifact)
    rejected = deployment(database, artifact)

    with database.write() as session:
        access.get_or_create_tenant(session, "kept")
        with pytest.raises(DeploymentConflict):
            artifacts.insert_deployment(session, rejected)

    with database.read() as session:
        tenant = access.get_or_create_tenant(session, "kept")
        assert tenant.last_served_at is None
        assert artifacts.count_deployments_of(session, artifact.id) == 1


def test_a_deleted_deployment_frees_its_name(database, artifact):
    hosted = deploy(database, artifact)

    with database.write() as session:
        artifacts.delete_deployment(session, artifact.tenant_id, hosted.id)

    again = deploy(database, artifact)
    with database.read() as session:
        found = artifacts.find_deployment(session, artifact.tenant_id, "chat")
        assert artifacts.get_deployment(session, artifact.tenant_id, again.id).id == found.id
        page = artifacts.list_deployments(session, artifact.tenant_id, Cursor(limit=1))
        assert ([each.id for each in page.items], page.has_more) == ([again.id], False)


def new_key(tenant_id, now, sha256):
    return ApiKey(
        id=new_id("key"),
        tenant_id=tenant_id,
        name="laptop",
        prefix="abq_live",
        sha256=sha256,
        scopes=["quant:read"],
        created_at=now,
    )


def test_a_key_is_found_by_its_hash_and_revoked_once(database, tenant_id, other_tenant):
    with database.write() as session:
        now = database_now(session)
        key = new_key(tenant_id, now, "c" * 64)
        access.insert_key(session, key)
        access.insert_key(session, new_key(other_tenant, now, "d" * 64))
        access.note_key_use(session, key.id, now + timedelta(seconds=1))

    with database.write() as session:
        first = access.revoke_key(session, tenant_id, key.id).revoked_at
        with pytest.raises(KeyNotFound):
            access.revoke_key(session, other_tenant, key.id)
    with database.write() as session:
        again = access.revoke_key(session, tenant_id, key.id)

    assert again.revoked_at == first
    with database.read() as session:
        found = access.find_key(session, "c" * 64)
        assert (found.id, found.scopes) == (key.id, ["quant:read"])
        assert found.last_used_at == now + timedelta(seconds=1)
        assert access.find_key(session, "e" * 64) is None
        assert access.count_keys(session) == 2
        assert [each.id for each in access.list_keys(session, tenant_id)] == [key.id]


def test_a_tenant_is_made_once(database):
    with database.write() as session:
        first = access.get_or_create_tenant(session, "default").id
    with database.write() as session:
        assert access.get_or_create_tenant(session, "default").id == first

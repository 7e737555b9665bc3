"""The control plane as tests use it: a real server on a port, with keys and jobs to order."""

import hashlib
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn

from api.app import create_app
from api.auth import Principal
from api.db.base import new_id
from api.db.connection import Database, database_now
from api.db.repositories.access import get_or_create_tenant
from api.db.repositories.leases import claim_job, complete_job, record_event
from api.db.tables.artifacts import Artifact, ArtifactFile
from api.db.tables.jobs import Job
from api.hub.routing import create_hub
from api.queue import create_celery
from api.schemas.keys import ApiKeyRequest, Scope
from api.services.inference import InferenceClient
from api.services.jobs import NewJob, create_job
from api.services.keys import create_key
from api.settings import Settings
from api.storage.local import create_store
from tests.servers import free_port

START_S = 10.0
FILES = {"config.json": b"{}", "model-00001-of-00001.safetensors": bytes(range(256)) * 300}


@dataclass(kw_only=True)
class RunningApi:
    """A server that answers, and what is behind it."""

    url: str
    settings: Settings
    database: Database

    def tenant(self, name="default"):
        """The id of a tenant, made where needed."""
        with self.database.write() as session:
            return get_or_create_tenant(session, name).id

    def key(self, *scopes, tenant="default"):
        """A new key of a tenant."""
        maker = Principal(
            tenant_id=self.tenant(tenant), key_id="key_test", scopes=frozenset({Scope.ADMIN})
        )
        wanted = ApiKeyRequest(name="test", scopes=scopes or (Scope.ADMIN,))
        return create_key(self.database, maker, wanted).text

    def client(self, *scopes, tenant="default"):
        """A client with a new key."""
        headers = {"Authorization": f"Bearer {self.key(*scopes, tenant=tenant)}"}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30)

    def queue_job(self, tenant="default", **fields):
        """A job as a create request makes it."""
        wanted = {
            "model": "acme/tiny",
            "revision": None,
            "source_sha": "f" * 40,
            "spec": {"w_bits": 4, "a_bits": 8},
            "evaluation": {"enabled": False},
        }
        job = NewJob(**(wanted | fields))
        return create_job(self.database, self.settings, self.tenant(tenant), job)

    def claim(self):
        """The lease of the job that is due next, as a worker gets it."""
        with self.database.write() as session:
            return claim_job(session, worker="w", lease_s=60, free_vram_bytes=None).lease

    def record(self, lease, kind, **data):
        """An event, as a worker records it."""
        with self.database.write() as session:
            return record_event(session, lease, kind, data)

    def finish(self, lease, files=None):
        """Complete a job with an artifact of these files; returns the artifact's id."""
        store, artifact_id = create_store(self.settings), new_id("art")
        rows = []
        for path, content in (files or FILES).items():
            source = self.settings.data_dir / "incoming"
            source.write_bytes(content)
            store.put_file(f"{artifact_id}/{path}", source)
            source.unlink()
            sha256 = hashlib.sha256(content).hexdigest()
            rows.append(
                ArtifactFile(artifact_id=artifact_id, path=path, bytes=len(content), sha256=sha256)
            )
        with self.database.write() as session:
            artifact = Artifact(
                id=artifact_id,
                tenant_id=session.get_one(Job, lease.job_id).tenant_id,
                job_id=lease.job_id,
                manifest_sha256="0" * 64,
                bytes=sum(row.bytes for row in rows),
                bits_per_weight=4.1,
                summary={"bits": {"per_weight": 4.1}},
                hub_commit=None,
                created_at=database_now(session),
            )
            complete_job(session, lease, report={}, artifact=artifact, files=rows)
        return artifact_id

    def artifact(self, tenant="default", files=None):
        """A job that succeeded, as the ids of job and artifact."""
        job = self.queue_job(tenant)
        lease = self.claim()
        assert lease.job_id == job.id, "another job was due first"
        return job.id, self.finish(lease, files)


@contextmanager
def run_api(settings, database):
    """Yield a server over these settings; it stops with the block."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    app = create_app(
        settings,
        database=database,
        store=create_store(settings),
        hub=create_hub(settings),
        celery=create_celery(settings),
        inference=InferenceClient(settings.inference),
    )
    with run_app(app) as url:
        yield RunningApi(url=url, settings=settings, database=database)


@contextmanager
def run_app(app):
    """Serve an ASGI application on a free port; yields its address."""
    port = free_port()
    config = uvicorn.Config(
        app, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        end = time.monotonic() + START_S
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < end, "the server did not start in time"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()

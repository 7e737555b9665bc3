"""A Hugging Face Hub of our own on a real socket: it counts bytes and misbehaves on request.

It speaks what huggingface_hub 1.33 and 2.4 speak when they resolve, read, create, upload, commit
and tag. `FakeHub.faults` says what goes wrong, `FakeHub.requests` what was asked.
"""

import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from tests.hub_faults import ANSWERS, Fault, Trouble
from tests.hub_repository import Repository
from tests.hub_routes import STRANGER, WRITER, router

__all__ = ["STRANGER", "WRITER", "FakeHub", "Trouble", "run_fake_hub"]


@dataclass
class Seen:
    """A request that arrived."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    sent_bytes: int = 0


@dataclass
class FakeHub:
    """State of the server; tests read and change it directly."""

    url: str
    repositories: dict = field(default_factory=dict)
    faults: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    uploads: dict = field(default_factory=dict)

    def reset(self):
        """Forget everything."""
        for held in (self.repositories, self.faults, self.requests, self.uploads):
            held.clear()

    def add(self, repo_id, files, **options):
        """Make a repository with one commit."""
        repository = Repository(repo_id, **options)
        repository.commit(files)
        self.repositories[repo_id] = repository
        return repository

    def inject(self, trouble, where, *, times=1, amount=0, skip=0):
        self.faults.append(Fault(trouble, where, times, amount, skip))

    def take(self, request, troubles):
        """The first fault of these kinds that concerns a request, used up by one."""
        name = f"{request.method} {request.url.path}"
        for fault in self.faults:
            if fault.trouble not in troubles or fault.where not in name or fault.times == 0:
                continue
            if fault.skip == 0:
                fault.times -= 1
                return fault
            fault.skip -= 1
        return None

    def bytes_of(self, path):
        """File bytes sent for paths that end so."""
        return sum(each.sent_bytes for each in self.requests if each.path.endswith(path))

    def paths(self, method="GET"):
        return [each.path for each in self.requests if each.method == method]


@contextmanager
def run_fake_hub():
    """Serve a fake Hub on a free port of this machine until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    hub = FakeHub(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    config = uvicorn.Config(_create_app(hub), log_level="critical", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield hub
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


def _create_app(hub):
    app = FastAPI(openapi_url=None)
    app.state.hub = hub

    @app.middleware("http")
    async def watch(request: Request, call_next):
        headers = request.headers
        seen = Seen(
            request.method, request.url.path, headers.get("range"), headers.get("authorization")
        )
        hub.requests.append(seen)
        request.state.seen = seen
        fault = hub.take(request, ANSWERS)
        if fault is None:
            return await call_next(request)
        after = {"Retry-After": str(fault.amount)} if fault.trouble is Trouble.BUSY else {}
        return JSONResponse({"error": fault.trouble}, ANSWERS[fault.trouble], headers=after)

    app.include_router(router)
    return app

"""An inference service that answers by script, for what a real one does only by accident."""

import asyncio
import json
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tests.running_api import run_app

START = {"type": "start", "prompt_tokens": 3}
FINISH = {"type": "finish", "index": 0, "finish_reason": "stop"}
END = {"type": "end", "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1}


def token(text, index=0, tokens=1, **fields):
    """A piece of an answer."""
    return {"type": "token", "index": index, "text": text, "tokens": tokens, **fields}


@dataclass
class FakeInference:
    """What it was asked, and what it will answer."""

    url: str = ""
    requests: list = field(default_factory=list)
    """Bodies of `POST /generate`."""
    headers: list = field(default_factory=list)
    loaded: list = field(default_factory=list)
    """Artifact ids, as `GET /models` lists them."""
    records: list = field(
        default_factory=lambda: [
            START, token("Hel"), token("lo", tokens=2), FINISH, END
        ]
    )  # fmt: skip
    progress: dict = field(default_factory=dict)
    """Further members of every model in the list."""
    refusal: tuple | None = None
    """Status, body and headers instead of records."""
    delay_s: float = 0.0
    """Before the first record."""
    pause_s: float = 0.0
    """Between two records."""
    cancelled: int = 0
    """Generations whose caller went away."""
    finished: int = 0
    sent: int = 0
    """Records that the connection took."""
    load: int = 0
    """Told with every answer."""

    def reset(self):
        """Forget everything but the address."""
        vars(self).update(vars(FakeInference(url=self.url)))


@contextmanager
def run_fake_inference():
    """Yield the service; it stops with the block."""
    fake, app = FakeInference(), FastAPI()

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        fake.requests.append(await request.json())
        fake.headers.append(dict(request.headers))
        if fake.refusal is not None:
            status, body, headers = fake.refusal
            return JSONResponse(body, status, headers)
        told = {"X-ABQ-Load": str(fake.load)}
        return StreamingResponse(_lines(fake), headers=told, media_type="application/x-ndjson")

    @app.get("/models")
    def list_models() -> Response:
        return JSONResponse(
            [
                {"artifact_id": each, "status": "ready", "error": None, "memory_bytes": 1000}
                | fake.progress
                for each in fake.loaded
            ]
        )

    @app.post("/models/{artifact_id}/load", status_code=202)
    def load(artifact_id: str) -> Response:
        if artifact_id not in fake.loaded:
            fake.loaded.append(artifact_id)
        return Response(status_code=202)

    @app.delete("/models/{artifact_id}")
    def unload(artifact_id: str) -> Response:
        if artifact_id not in fake.loaded:
            return Response(status_code=404)
        fake.loaded.remove(artifact_id)
        return Response(status_code=204)

    with run_app(app) as url:
        fake.url = url
        yield fake


async def _lines(fake):
    try:
        await asyncio.sleep(fake.delay_s)
        for record in fake.records:
            yield json.dumps(record) + "\n"
            fake.sent += 1
            await asyncio.sleep(fake.pause_s)
        fake.finished += 1
    except (asyncio.CancelledError, GeneratorExit):
        fake.cancelled += 1
        raise

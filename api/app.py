"""The control plane as one ASGI application over the ports that it is given."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from celery import Celery
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from api.db.connection import Database
from api.deps import Ports
from api.dispatch import Dispatcher
from api.errors import BodyTooLarge, ServiceError
from api.hub.base import ModelHub
from api.problems import error_response, install_error_handlers, is_openai_path
from api.routes.interface import Interface
from api.services.events import EventFeed
from api.services.health import JobCollector
from api.services.inference import InferenceClient
from api.services.limits import KeyLimits
from api.settings import LimitSettings, Settings
from api.storage.base import ObjectStore
from api.telemetry import Metrics, bind_context, get_logger

__all__ = ["create_app"]

log = get_logger(__name__)

REQUEST_ID = "X-Request-Id"
MAX_REQUEST_ID = 100
UNROUTED = "(none)"


def create_app(
    settings: Settings,
    *,
    database: Database,
    store: ObjectStore,
    hub: ModelHub,
    celery: Celery,
    inference: InferenceClient,
) -> FastAPI:
    """Build the application; while it runs, it relays wake-ups and reaps lost jobs."""
    ports = Ports(
        settings=settings,
        database=database,
        store=store,
        hub=hub,
        inference=inference,
        limits=KeyLimits(settings.limits),
        feed=EventFeed(database),
        metrics=Metrics(JobCollector(database)),
    )
    app = Interface(lifespan=_lifespan(ports, Dispatcher(database, celery, settings)))
    app.state.ports = ports
    install_error_handlers(app)
    # the last one added is the outermost
    app.add_middleware(BodyLimit, limits=settings.limits)
    app.add_middleware(RequestTelemetry, metrics=ports.metrics)
    return app


class BodyLimit:
    """Reads bodies up to a limit before the app sees them; larger ones are answered with 413."""

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_prompt = is_openai_path(scope["path"])
        limit = self._limits.prompt_bytes if is_prompt else self._limits.request_bytes
        body = await self._read(receive, limit)
        if body is None:
            error = BodyTooLarge(f"The body has more than {limit} bytes.")
            await error_response(scope, error)(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive, limit: int) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > limit:
                return None
            if not message.get("more_body", False):
                return bytes(body)


class RequestTelemetry:
    """Gives each request an id, measures and logs it, and answers what nobody else could."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        exchange, started = _Exchange(send, request_id), time.perf_counter()
        with bind_context(request_id=request_id):
            try:
                await self._app(scope, receive, exchange.send)
            except Exception:
                log.exception("request_failed")
                if exchange.status is not None:
                    # a part of the answer is out: only the cut connection can say that it failed
                    raise
                # no internals: the log has them under the request id
                fault = ServiceError("The service failed at this request.")
                await error_response(scope, fault)(scope, receive, exchange.send)
            finally:
                self._record(scope, exchange.status or 500, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method, route = scope["method"], getattr(scope.get("route"), "path", UNROUTED)
        self._metrics.observe_request(method, route, status, seconds)
        fields = {"path": scope["path"], "status": status, "seconds": round(seconds, 4)}
        log.info("request_answered", method=method, **fields)


class _Exchange:
    """One answer on its way out: its status, and the request id that it carries."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._header = (REQUEST_ID.lower().encode(), request_id.encode())
        self.status: int | None = None
        """None until the answer has begun."""

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            others = [each for each in message["headers"] if each[0].lower() != self._header[0]]
            message = {**message, "headers": [*others, self._header]}
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is short and printable, else a new one."""
    for name, value in scope["headers"]:
        given = value.decode("latin-1")
        is_usable = given.isascii() and given.isprintable() and 0 < len(given) <= MAX_REQUEST_ID
        if name == REQUEST_ID.lower().encode() and is_usable:
            return str(given)
    return f"req_{ULID()}"


def _lifespan(
    ports: Ports, dispatcher: Dispatcher
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def run(_app: FastAPI) -> AsyncGenerator[None]:
        dispatcher.start()
        try:
            yield
        finally:
            dispatcher.stop()
            await ports.feed.close()
            await ports.inference.close()

    return run

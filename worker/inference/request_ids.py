"""The id of a request, as the API process gave it: in every log line and in the answer."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.telemetry import bind_context

__all__ = ["RequestIds"]

HEADER = b"x-request-id"
MAX_LENGTH = 100


class RequestIds:
    """Middleware that binds the id to the log's context; a request without one has none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        given = dict(scope.get("headers", ())).get(HEADER, b"")[:MAX_LENGTH]
        if scope["type"] != "http" or not given:
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (HEADER, given)]}
            await send(message)

        with bind_context(request_id=given.decode("latin-1")):
            await self._app(scope, receive, send_with_id)

"""An HTTP client of the API: a base URL, a key, and problem documents raised as `ApiProblem`."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from json import JSONDecodeError
from typing import Any, Self

import httpx

from api.cli.errors import ApiProblem, ServiceUnreachable

__all__ = ["ApiClient"]

CONNECT_S = 5.0
READ_S = 60.0
"""Longer than the 15 s between the comments of an event stream."""


class ApiClient:
    """Talks to one service as one key."""

    def __init__(
        self, url: str, api_key: str | None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=url,
            headers={"User-Agent": "abq", **headers},
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Read a resource; parameters that are None are left out."""
        given = {name: value for name, value in (params or {}).items() if value is not None}
        return self._send("GET", path, params=given)

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Create or change a resource."""
        return self._send("POST", path, json=body, headers=headers)

    def delete(self, path: str) -> dict[str, Any]:
        """Remove a resource."""
        return self._send("DELETE", path)

    def pages(self, path: str, params: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
        """Read up to `limit` entries of a list, newest first, page by page."""
        entries: list[dict[str, Any]] = []
        after = None
        while len(entries) < limit:
            wanted = min(limit - len(entries), 100)
            page = self.get(path, {**params, "after": after, "limit": wanted})
            entries += page["data"]
            after = page.get("last_id")
            if not page.get("has_more") or after is None:
                break
        return entries

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        """Open a response whose body is read piece by piece.

        Raises:
            ApiProblem: if the service refuses, before the body.
            ServiceUnreachable: if it cannot be reached or the body breaks off.
        """
        with _unreachable(self._http.base_url):
            request = self._http.build_request(method, path, json=body, headers=headers)
            response = self._http.send(request, stream=True)
            with closing(response):
                if response.is_error:
                    response.read()
                    raise _problem(response)
                yield response

    def _send(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        with _unreachable(self._http.base_url):
            response = self._http.request(method, path, **options)
        if response.is_error:
            raise _problem(response)
        if not response.content:
            return {}
        try:
            answer: dict[str, Any] = response.json()
        except JSONDecodeError as error:
            raise ServiceUnreachable(f"{response.url} is no ABQ service; check --url") from error
        return answer


@contextmanager
def _unreachable(url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        message = f"no service answers at {url} ({reason}); start one with abq up, or set ABQ_URL"
        raise ServiceUnreachable(message) from error
    except httpx.InvalidURL as error:
        raise ServiceUnreachable(f"{url} is no URL; set ABQ_URL to http://host:port") from error


def _problem(response: httpx.Response) -> ApiProblem:
    """Read a problem document, or OpenAI's error object, or neither."""
    try:
        record = response.json()
    except ValueError:
        record = {"detail": response.text[:200]}
    if not isinstance(record, dict):
        record = {"detail": str(record)[:200]}
    error = record.get("error")
    return ApiProblem(response.status_code, error if isinstance(error, dict) else record)

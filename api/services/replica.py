"""One inference service: what it is asked, and how busy it is."""

import json
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx

from api.errors import InferenceUnavailable
from api.services.refusals import error_of_response
from api.settings import InferenceSettings

__all__ = ["Batch", "Replica"]

INTERNAL_HEADER = "X-ABQ-Internal-Token"
LOAD_HEADER = "X-ABQ-Load"
"""Generations that run or wait there, those of other gateways included."""
REQUEST_ID = "X-Request-Id"
CONNECT_TIMEOUT_S = 2.0
CONTROL_TIMEOUT_S = 10.0
LOAD_AGE_S = 2.0
"""A load that was told longer ago says nothing any more."""
REST_S = 5.0
"""One that did not answer is asked last for so long."""

Record = dict[str, Any]
Batch = list[Record]
"""Records that came in together, at least one."""


class Replica:
    """A client of one inference service; threads and tasks may share it."""

    def __init__(self, url: str, settings: InferenceSettings) -> None:
        headers = {INTERNAL_HEADER: settings.token.get_secret_value()} if settings.token else {}
        control = httpx.Timeout(CONTROL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        # a first token may wait for the model to be read into memory
        stream = httpx.Timeout(settings.load_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
        # every generation holds a connection: the services bound how many there are
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        # trust_env off: a proxy for the outside must not see what is private
        self._control = httpx.Client(
            base_url=url, headers=headers, timeout=control, trust_env=False
        )
        self._stream = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=stream, limits=limits, trust_env=False
        )
        self._running = 0
        self._told, self._told_at = 0, float("-inf")
        self._rests_until = float("-inf")

    @property
    def is_resting(self) -> bool:
        """Whether it did not answer a moment ago."""
        return time.monotonic() < self._rests_until

    @property
    def load(self) -> int:
        """Generations that run or wait there, as far as is known."""
        is_fresh = time.monotonic() - self._told_at < LOAD_AGE_S
        return max(self._running, self._told if is_fresh else 0)

    def call(self, method: str, path: str) -> httpx.Response:
        """Ask something that is answered at once; blocks.

        Raises:
            ServiceError: what the service refused.
            InferenceUnavailable: it does not answer.
        """
        try:
            response = self._control.request(method, path)
        except httpx.HTTPError as error:
            raise InferenceUnavailable from error
        if response.is_error:
            raise error_of_response(response)
        return response

    async def ask(self, path: str, body: Mapping[str, Any], request_id: str) -> Record:
        """Post something and read the answer.

        Raises:
            ServiceError: what the service refused.
            InferenceUnavailable: it does not answer.
        """
        headers = {REQUEST_ID: request_id}
        try:
            response = await self._stream.post(path, json=dict(body), headers=headers)
        except httpx.HTTPError as error:
            self._rest()
            raise InferenceUnavailable from error
        if response.is_error:
            raise error_of_response(response)
        answer: Record = response.json()
        return answer

    async def generate(self, body: Mapping[str, Any], request_id: str) -> AsyncGenerator[Batch]:
        """Yield the records of one generation; closing the generator cancels it.

        Raises:
            ServiceError: what the service refused the request for.
            InferenceUnavailable: it does not answer, or broke off.
        """
        self._running += 1
        headers = {REQUEST_ID: request_id}
        try:
            async with self._stream.stream(
                "POST", "/generate", json=dict(body), headers=headers
            ) as response:
                self._note_load(response)
                if response.is_error:
                    await response.aread()
                    raise error_of_response(response)
                async for batch in _batches(response):
                    yield batch
        except httpx.HTTPError as error:
            self._rest()
            raise InferenceUnavailable from error
        finally:
            self._running -= 1

    async def close(self) -> None:
        """Close all connections."""
        self._control.close()
        await self._stream.aclose()

    def _note_load(self, response: httpx.Response) -> None:
        told = response.headers.get(LOAD_HEADER, "")
        if told.isdecimal():
            self._told, self._told_at = int(told), time.monotonic()

    def _rest(self) -> None:
        self._rests_until = time.monotonic() + REST_S


async def _batches(response: httpx.Response) -> AsyncGenerator[Batch]:
    """What one read of the connection brought is passed on together."""
    kept = b""
    async for data in response.aiter_bytes():
        *lines, kept = (kept + data).split(b"\n")
        batch = [json.loads(line) for line in lines if line]
        if batch:
            yield batch

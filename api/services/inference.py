"""The client of the private inference service: load, unload, generate as a stream of records."""

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx

from api.errors import (
    ContextTooLong,
    InferenceDraining,
    InferenceOverloaded,
    InferenceUnavailable,
    InvalidRequest,
    ModelLoading,
    ModelNotHosted,
    ServiceError,
    UnsupportedParameter,
)
from api.settings import InferenceSettings
from api.telemetry import get_logger

__all__ = ["InferenceClient", "error_of_record"]

log = get_logger(__name__)

INTERNAL_HEADER = "X-ABQ-Internal-Token"
CONNECT_TIMEOUT_S = 2.0
CONTROL_TIMEOUT_S = 10.0
MODEL_FAILED = "model_failed"
"""The one fault whose message is meant for the caller."""

BY_CODE: Mapping[str, type[ServiceError]] = {
    each.code: each
    for each in (
        ContextTooLong,
        InferenceDraining,
        InferenceOverloaded,
        ModelLoading,
        ModelNotHosted,
        UnsupportedParameter,
    )
}


class InferenceClient:
    """Speaks to one inference service; threads and tasks may share it."""

    def __init__(self, settings: InferenceSettings) -> None:
        headers = {INTERNAL_HEADER: settings.token.get_secret_value()} if settings.token else {}
        control = httpx.Timeout(CONTROL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        # a first token may wait for the model to be read into memory
        stream = httpx.Timeout(settings.load_timeout_s, connect=CONNECT_TIMEOUT_S)
        # trust_env off: a proxy for the outside must not see what is private
        self._control = httpx.Client(
            base_url=settings.url, headers=headers, timeout=control, trust_env=False
        )
        self._stream = httpx.AsyncClient(
            base_url=settings.url, headers=headers, timeout=stream, trust_env=False
        )

    def load(self, artifact_id: str) -> None:
        """Have an artifact read into memory; returns before it is there.

        Raises:
            InferenceUnavailable: the service does not answer.
        """
        self._call("POST", f"/models/{artifact_id}/load")

    def unload(self, artifact_id: str) -> None:
        """Have an artifact dropped from memory.

        Raises:
            InferenceUnavailable: the service does not answer.
        """
        self._call("DELETE", f"/models/{artifact_id}")

    def list_models(self) -> list[dict[str, Any]]:
        """What is in memory: artifact_id, status, error, memory_bytes.

        Raises:
            InferenceUnavailable: the service does not answer.
        """
        models: list[dict[str, Any]] = self._call("GET", "/models").json()
        return models

    async def generate(self, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Yield the records of one generation; closing the generator cancels it.

        Raises:
            ServiceError: what the service refused the request for.
            InferenceUnavailable: the service does not answer, or broke off.
        """
        try:
            async with self._stream.stream("POST", "/generate", json=dict(request)) as response:
                if response.is_error:
                    await response.aread()
                    raise _refusal(response)
                async for line in response.aiter_lines():
                    if line:
                        yield json.loads(line)
        except httpx.HTTPError as error:
            raise InferenceUnavailable from error

    async def close(self) -> None:
        """Close all connections."""
        self._control.close()
        await self._stream.aclose()

    def _call(self, method: str, path: str) -> httpx.Response:
        try:
            response = self._control.request(method, path)
        except httpx.HTTPError as error:
            raise InferenceUnavailable from error
        if response.is_error:
            raise _refusal(response)
        return response


def error_of_record(record: Mapping[str, Any], status: int = 500) -> ServiceError:
    """Make the service's error out of an error record of the inference service."""
    message, param = record.get("message"), record.get("param")
    if kind := BY_CODE.get(str(record.get("code"))):
        return kind(message, param=param)
    if status in {401, 403}:
        # the two processes do not share a token: nothing that the caller could mend
        log.error("inference_refuses_the_api", status=status)
        return InferenceUnavailable()
    if 400 <= status < 500:
        return InvalidRequest(message, param=param)
    if status == 503:
        return InferenceUnavailable()
    return ServiceError(message if record.get("code") == MODEL_FAILED else "The generation failed.")


def _refusal(response: httpx.Response) -> ServiceError:
    try:
        record = response.json()
    except ValueError:
        record = None
    error = error_of_record(record if isinstance(record, dict) else {}, response.status_code)
    if "Retry-After" in response.headers and response.status_code == 503:
        error.extra["retry_after_s"] = response.headers["Retry-After"]
    return error

"""What the inference service refuses or fails at, as the service's own errors."""

from collections.abc import Mapping
from typing import Any

import httpx

from api.errors import (
    ContextTooLong,
    GuideNotFollowed,
    InferenceDraining,
    InferenceOverloaded,
    InferenceUnavailable,
    InvalidRequest,
    ModelLoading,
    ModelNotHosted,
    ServiceError,
    UnsupportedParameter,
)
from api.telemetry import get_logger

__all__ = ["error_of_record", "error_of_response"]

log = get_logger(__name__)

MODEL_FAILED = "model_failed"
"""The one fault whose message is meant for the caller."""

BY_CODE: Mapping[str, type[ServiceError]] = {
    each.code: each
    for each in (
        ContextTooLong,
        GuideNotFollowed,
        InferenceDraining,
        InferenceOverloaded,
        InferenceUnavailable,
        InvalidRequest,
        ModelLoading,
        ModelNotHosted,
        UnsupportedParameter,
    )
}


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


def error_of_response(response: httpx.Response) -> ServiceError:
    """Make the service's error out of a refusal that was read."""
    try:
        record = response.json()
    except ValueError:
        record = None
    error = error_of_record(record if isinstance(record, dict) else {}, response.status_code)
    if "Retry-After" in response.headers and response.status_code == 503:
        error.extra["retry_after_s"] = response.headers["Retry-After"]
    return error

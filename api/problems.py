"""Errors as responses: RFC 9457 problem documents, and OpenAI's error object on its routes.

The only place that knows both the service's errors and their form on the wire.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.errors import InvalidRequest, KeyRejected, ServiceError, UnsupportedParameter
from api.schemas.base import FieldError, OpenAIError, Problem
from api.schemas.field_errors import UNKNOWN_FIELD, field_errors, one_message

__all__ = ["error_response", "install_error_handlers", "is_openai_path"]

OPENAI_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/detokenize", "/v1/models", "/v1/tokenize"
)  # fmt: skip
TYPE_ROOT = "urn:abq:problem:"
DOC_ROOT = "/problems/"
RETRY_AFTER_S = 5
"""Sent with 429 and 503 where the error names no other time."""


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in its wire form."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(DataError, _on_data_error)


def error_response(scope: Mapping[str, Any], error: ServiceError) -> Response:
    """Render an error as the answer to the request of an ASGI scope."""
    members = {name: value for name, value in error.extra.items() if name != "errors"}
    failure = _Failure(
        status=error.status,
        code=error.code,
        message=error.message,
        param=error.param,
        errors=tuple(error.extra.get("errors", ())),
        headers=dict(members.pop("headers", {})),
        members=members,
    )
    return _render(scope, failure)


def is_openai_path(path: str) -> bool:
    """Whether callers of a path expect OpenAI's error object."""
    return any(path == each or path.startswith(f"{each}/") for each in OPENAI_PATHS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    status: int
    code: str
    message: str
    param: str | None = None
    errors: tuple[FieldError, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    members: dict[str, Any] = field(default_factory=dict)


def _render(scope: Mapping[str, Any], failure: _Failure) -> Response:
    path, request_id = str(scope["path"]), str(scope.get("state", {}).get("request_id", ""))
    headers = {**failure.headers, **_status_headers(failure), "X-Request-Id": request_id}
    if is_openai_path(path):
        status = 400 if failure.status == 422 else failure.status
        # to OpenAI's clients a missing key and a wrong one are the same
        code = KeyRejected.code if status == 401 else failure.code
        openai = OpenAIError.of(
            status=status, code=code, message=failure.message, param=failure.param
        )
        return JSONResponse(openai.model_dump(), status, headers)
    problem = Problem(
        type=TYPE_ROOT + failure.code,
        title=HTTPStatus(failure.status).phrase,
        status=failure.status,
        detail=failure.message,
        instance=path,
        code=failure.code,
        param=failure.param,
        errors=failure.errors,
        request_id=request_id,
        doc_url=DOC_ROOT + failure.code,
        **failure.members,
    )
    content = problem.model_dump(mode="json")
    return JSONResponse(content, failure.status, headers, "application/problem+json")


def _status_headers(failure: _Failure) -> dict[str, str]:
    match failure.status:
        case 401:
            fault = ', error="invalid_token"' if failure.code == KeyRejected.code else ""
            return {"WWW-Authenticate": f'Bearer realm="abq"{fault}'}
        case 429 | 503:
            seconds = failure.members.get("retry_after_s", RETRY_AFTER_S)
            return {"Retry-After": str(seconds)}
        case _:
            return {}


def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101 - what the handler is registered for
    return error_response(request.scope, error)


def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    items = field_errors(error.errors())
    is_unsupported = is_openai_path(request.url.path) and items[0].code in UNKNOWN_FIELD
    kind = UnsupportedParameter if is_unsupported else InvalidRequest
    return error_response(
        request.scope, kind(one_message(items), param=items[0].param, errors=items)
    )


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what the handler is registered for
    phrase = HTTPStatus(error.status_code).phrase
    messages = {
        400: _unread(error.__cause__),
        404: f"No such resource: {request.url.path}.",
        405: f"{request.method} is not possible here.",
    }
    failure = _Failure(
        status=error.status_code,
        code=phrase.lower().replace(" ", "_"),
        message=messages.get(error.status_code, f"{phrase}."),
        headers=dict(error.headers or {}),
    )
    return _render(request.scope, failure)


def _unread(cause: BaseException | None) -> str:
    """Say why a body could not be read, and what would do."""
    match cause:
        case RecursionError():
            return "The body nests too deep: use fewer lists and objects inside of each other."
        case UnicodeDecodeError():
            return "The body is no valid UTF-8: encode it so."
        case ValueError():
            # Python reads no integer of more digits
            return "The body has an integer of too many digits: use up to 4300."
        case _:
            return "The request could not be read."


def _on_data_error(request: Request, _error: Exception) -> Response:
    # PostgreSQL holds no NUL, wherever in a request it came from
    refusal = InvalidRequest("The request has a text or a number that cannot be stored.")
    return error_response(request.scope, refusal)

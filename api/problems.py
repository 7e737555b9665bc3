"""Errors as responses: RFC 9457 problem documents, and OpenAI's error object on its routes.

The only place that knows both the service's errors and their form on the wire.
"""

import math
from collections.abc import Mapping, Sequence
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
from api.schemas.json_values import JsonValueInvalid
from engine.errors import SpecError

__all__ = ["error_response", "install_error_handlers", "is_openai_path"]

OPENAI_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/detokenize", "/v1/models", "/v1/tokenize"
)  # fmt: skip
TYPE_ROOT = "urn:abq:problem:"
DOC_ROOT = "/problems/"
RETRY_AFTER_S = 5
"""Sent with 429 and 503 where the error names no other time."""
# the parts of a request that pydantic names first in an error's location
REQUEST_PARTS = ("body", "query", "path", "header")
UNKNOWN_FIELD = ("extra_forbidden", "unexpected_keyword_argument")
MISSING_FIELD = ("missing", "missing_argument", "missing_keyword_only_argument")
MAX_SHOWN = 100


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
    items = [_encodable(_field_error(each)) for each in _innermost(error.errors())]
    named = ", ".join(str(each.param) for each in items)
    several = f"{len(items)} fields are not valid: {named}."
    message = items[0].message if len(items) == 1 else several
    is_unsupported = is_openai_path(request.url.path) and items[0].code in UNKNOWN_FIELD
    kind = UnsupportedParameter if is_unsupported else InvalidRequest
    return error_response(request.scope, kind(message, param=items[0].param, errors=items))


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what the handler is registered for
    phrase = HTTPStatus(error.status_code).phrase
    messages = {
        400: "The request could not be read.",
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


def _on_data_error(request: Request, _error: Exception) -> Response:
    # PostgreSQL holds no NUL, wherever in a request it came from
    refusal = InvalidRequest("The request has a text or a number that cannot be stored.")
    return error_response(request.scope, refusal)


def _innermost(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    # a list whose only item is wrong is also reported as too short; the item is what matters
    places = [tuple(each["loc"]) for each in found]
    return [
        each
        for each, place in zip(found, places, strict=True)
        if not any(other != place and other[: len(place)] == place for other in places)
    ]


def _field_error(found: Mapping[str, Any]) -> FieldError:
    location = tuple(found["loc"])
    location = location[1:] if location and location[0] in REQUEST_PARTS else location
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, SpecError):
        return _spec_item(location, cause)
    if isinstance(cause, JsonValueInvalid):
        return _json_item(location, cause)
    if found["type"] == "json_invalid":
        return FieldError(param=None, code=found["type"], message="The body is no valid JSON.")
    param = ".".join(str(part) for part in location if part != "[key]") or None
    message = _sentence(param, found)
    value = _shown(found.get("input")) if found["type"] not in MISSING_FIELD else None
    return FieldError(param=param, code=found["type"], message=message, value=value)


def _spec_item(location: tuple[Any, ...], error: SpecError) -> FieldError:
    """Join where pydantic was with the field that the vocabulary names, each part once."""
    parts = [part for part in error.field.split(".") if part not in location]
    return FieldError(
        param=".".join(str(part) for part in (*location, *parts)),
        code=error.code,
        message=error.message,
        value=_shown(error.value),
        remedy=error.remedy,
    )


def _json_item(location: tuple[Any, ...], error: JsonValueInvalid) -> FieldError:
    param = ".".join(str(part) for part in (*location, *error.place))
    value = _shown(error.value)
    return FieldError(
        param=param,
        code=error.code,
        message=f"{param} = {value!r} is not possible: {error.remedy}.",
        value=value,
        remedy=error.remedy,
    )


def _sentence(param: str | None, found: Mapping[str, Any]) -> str:
    subject = param or "the body"
    if found["type"] in MISSING_FIELD:
        return f"{subject} is required."
    value = _shown(found.get("input"))
    given = f"{subject} = {value!r}" if value is not None else subject
    if found["type"] in UNKNOWN_FIELD:
        return f"{given} is no supported field; remove it or correct its name."
    text = str(found["msg"]).removeprefix("Value error, ")
    return f"{given} is not valid: {text[:1].lower()}{text[1:]}."


def _shown(value: object) -> str | int | float | None:
    """What of a refused value an answer repeats."""
    if isinstance(value, str):
        return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."
    return value if isinstance(value, int | float) else None


def _encodable(item: FieldError) -> FieldError:
    """Spell out what a refused text or number has that no answer can hold."""
    value = item.value
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    return item.model_copy(
        update={
            "param": None if item.param is None else _escaped(item.param),
            "message": _escaped(item.message),
            "value": _escaped(value) if isinstance(value, str) else value,
        }
    )


def _escaped(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()

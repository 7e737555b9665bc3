"""Errors as responses: RFC 9457 problem documents, and OpenAI's error object on its routes.

The only place that knows both the service's errors and their form on the wire.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.errors import BodyTooLarge, ConfigRejected, InvalidRequest, KeyRejected, ServiceError
from api.schemas.base import FieldError, OpenAIError, Problem
from engine.errors import SpecError, UnsupportedModel

__all__ = ["error_response", "install_error_handlers", "is_openai_path"]

OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
TYPE_ROOT = "urn:abq:problem:"
DOC_ROOT = "/problems/"
RETRY_AFTER_S = 5
"""Sent with 429 and 503 where the error names no other time."""
# the parts of a request that pydantic names first in an error's location
REQUEST_PARTS = ("body", "query", "path", "header")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in its wire form."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(SpecError, _on_spec_error)
    app.add_exception_handler(UnsupportedModel, _on_unsupported_model)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_fault)


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


def _on_spec_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SpecError)  # noqa: S101 - what the handler is registered for
    item = _spec_item(("spec",), error)
    return error_response(
        request.scope, InvalidRequest(error.message, param=item.param, errors=[item])
    )


def _on_unsupported_model(request: Request, error: Exception) -> Response:
    assert isinstance(error, UnsupportedModel)  # noqa: S101 - what the handler is registered for
    refusal = ConfigRejected(error.message, param="model", field=error.field)
    return error_response(request.scope, refusal)


def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    items = [_field_error(each) for each in error.errors()]
    named = ", ".join(str(each.param) for each in items)
    several = f"{len(items)} fields are not valid: {named}."
    message = items[0].message if len(items) == 1 else several
    refusal = InvalidRequest(message, param=items[0].param, errors=items)
    return error_response(request.scope, refusal)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what the handler is registered for
    if error.status_code == BodyTooLarge.status:
        return error_response(request.scope, BodyTooLarge())
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


def _on_fault(request: Request, _error: Exception) -> Response:
    # no internals in the message; the log has them under the request id
    return error_response(request.scope, ServiceError("The service failed at this request."))


def _field_error(found: Mapping[str, Any]) -> FieldError:
    location = tuple(found["loc"])
    location = location[1:] if location and location[0] in REQUEST_PARTS else location
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, SpecError):
        return _spec_item(location, cause)
    param = ".".join(str(part) for part in location) or None
    return FieldError(param=param, code=found["type"], message=_sentence(param, found))


def _spec_item(location: tuple[Any, ...], error: SpecError) -> FieldError:
    """Join where pydantic was with the field that the vocabulary names, each part once."""
    parts = [part for part in error.field.split(".") if part not in location]
    return FieldError(
        param=".".join(str(part) for part in (*location, *parts)),
        code=error.code,
        message=error.message,
        value=error.value if isinstance(error.value, str | int | float | None) else None,
        remedy=error.remedy,
    )


def _sentence(param: str | None, found: Mapping[str, Any]) -> str:
    subject = param or "the body"
    match found["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{subject} is no known field; remove it or correct its name."
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{subject} is required."
        case "json_invalid":
            return "The body is no valid JSON."
        case _:
            text = str(found["msg"]).removeprefix("Value error, ")
            return f"{subject}: {text[:1].lower()}{text[1:]}."

"""What all schemas share: strict fields, lists in pages, and the two forms of an error."""

from collections.abc import Sequence
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

__all__ = ["Deleted", "FieldError", "OpenAIError", "OpenAIErrorBody", "Page", "Problem", "Schema"]


Item = TypeVar("Item", bound=BaseModel)


class Schema(BaseModel):
    """A request or response body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Page(Schema, Generic[Item]):
    """A list of objects, newest first; `after=<last_id>` asks for the next page."""

    object: Literal["list"] = "list"
    data: tuple[Item, ...]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False

    @classmethod
    def of(cls, items: Sequence[Item], *, has_more: bool = False) -> Self:
        """Make a page of objects that have an `id`."""
        ids = [str(getattr(item, "id", "")) for item in items]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        return cls(data=tuple(items), first_id=first, last_id=last, has_more=has_more)


class Deleted(Schema):
    """A resource is gone."""

    id: str
    object: str
    deleted: Literal[True] = True


class FieldError(Schema):
    """What is wrong with one field of a request."""

    param: str | None
    code: str
    message: str
    value: str | int | float | bool | None = None
    remedy: str | None = None


class Problem(BaseModel):
    """An error as RFC 9457 describes it, with this service's members."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    """Stable; what programs should look at."""
    param: str | None = None
    """The field at fault, as a dotted path."""
    errors: tuple[FieldError, ...] = ()
    request_id: str
    doc_url: str


class OpenAIErrorBody(Schema):
    """What went wrong, in OpenAI's words."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = None
    code: str | None = None


class OpenAIError(Schema):
    """An error as OpenAI's clients parse it."""

    error: OpenAIErrorBody

    @classmethod
    def of(cls, *, status: int, code: str, message: str, param: str | None) -> Self:
        """Make the object for an HTTP status."""
        kind: Any = "server_error" if status >= 500 else "invalid_request_error"
        body = OpenAIErrorBody(
            message=message,
            type="rate_limit_error" if status == 429 else kind,
            param=param,
            # a fault has no code: there is nothing in it that a program could act on
            code=None if status == 500 else code,
        )
        return cls(error=body)

"""One page of a list, newest first, with the ids of its rows as cursors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, and_, or_
from sqlalchemy.orm import Session

from api.db.tables.artifacts import Deployment
from api.db.tables.jobs import Job
from api.errors import InvalidRequest

__all__ = ["MAX_PAGE", "Cursor", "Page", "read_page"]

MAX_PAGE = 100

Row = TypeVar("Row", Job, Deployment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a page starts: behind one row or in front of one, and how long it is."""

    after: str | None = None
    before: str | None = None
    limit: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Row]):
    """Rows in the order (created_at, id), descending."""

    items: Sequence[Row]
    has_more: bool
    """Whether further rows follow in the direction of travel."""


def read_page(
    session: Session, table: type[Row], query: Select[Any], tenant_id: str, cursor: Cursor
) -> Page[Row]:
    """Read the page of `query` that a cursor points at.

    Raises:
        InvalidRequest: the limit is not 1 to 100, both ends are given, or the row is unknown.
    """
    if not 1 <= cursor.limit <= MAX_PAGE:
        raise InvalidRequest(f"limit = {cursor.limit} is not 1 to {MAX_PAGE}", param="limit")
    if cursor.after and cursor.before:
        raise InvalidRequest("give after or before, not both", param="before")
    query = query.where(table.tenant_id == tenant_id)
    backwards = cursor.before is not None
    anchor_id = cursor.before or cursor.after
    if anchor_id:
        anchor = session.get(table, anchor_id)
        if anchor is None or anchor.tenant_id != tenant_id:
            name = "before" if backwards else "after"
            raise InvalidRequest(f"{name} = {anchor_id!r} is no id in this list", param=name)
        query = query.where(_beyond(table, anchor, backwards=backwards))
    order = (table.created_at, table.id)
    query = query.order_by(*(order if backwards else [column.desc() for column in order]))
    rows = session.scalars(query.limit(cursor.limit + 1)).all()
    items = rows[: cursor.limit]
    return Page(
        items=list(reversed(items)) if backwards else items, has_more=len(rows) > cursor.limit
    )


def _beyond(table: type[Row], anchor: Row, *, backwards: bool) -> Any:
    # written out: a comparison of row values would not use the index on SQLite
    same_moment = table.created_at == anchor.created_at
    if backwards:
        return or_(table.created_at > anchor.created_at, and_(same_moment, table.id > anchor.id))
    return or_(table.created_at < anchor.created_at, and_(same_moment, table.id < anchor.id))

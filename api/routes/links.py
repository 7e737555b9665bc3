"""The `Link` header that leads from one page of a list to the next."""

from typing import Any

from fastapi import Request

from api.schemas.base import Page

__all__ = ["link_to_next"]


def link_to_next(request: Request, page: Page[Any]) -> dict[str, str]:
    """The header for what follows a page; nothing behind the last one.

    It is relative, so that it also holds behind a proxy with another name.
    """
    if not page.has_more:
        return {}
    backwards = "before" in request.query_params
    cursor = {"before": page.first_id} if backwards else {"after": page.last_id}
    url = request.url.include_query_params(**cursor)
    return {"Link": f'<{url.path}?{url.query}>; rel="next"'}

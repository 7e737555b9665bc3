"""HTTP to the Hub through huggingface_hub's client: errors translated, brief failures retried."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# public, but not re-exported in the way that mypy asks for
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)

from api.errors import (
    HubUnavailable,
    ModelGated,
    ModelNotFound,
    RevisionNotFound,
    ServiceError,
)
from api.hub.base import ResolvedModel

__all__ = ["HubConnection"]

Result = TypeVar("Result")

# httpx under huggingface_hub 1, httpx2 under 2: the root of its errors is the one name to go by
TRANSPORT_ERROR: type[Exception] = next(
    each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError"
)
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 15.0
CHECK_INTERVAL_S = 0.5
STALL_S = 4.0
"""A body that brings nothing for so long is asked for again; bounds how long a cancel waits."""


def _continue() -> None:
    """Let every wait run to its end."""


log = logging.getLogger(__name__)


class HubConnection:
    """Requests of one process to one Hub. Threads may share it."""

    def __init__(
        self, *, endpoint: str, token: str | None, timeout_s: float, patience_s: float
    ) -> None:
        # False, not None: a token that lies around on the machine must never be sent
        self._token: str | bool = token or False
        self._patience_s = patience_s
        self._endpoint = endpoint.rstrip("/")
        self.timeout_s = timeout_s
        self.api = HfApi(endpoint=self._endpoint, token=self._token)

    @property
    def has_token(self) -> bool:
        """Whether requests carry a token."""
        return self._token is not False

    def url_of(self, repo_id: str) -> str:
        """The page of a model."""
        return f"{self._endpoint}/{repo_id}"

    def new_patience(self, check: Callable[[], None] = _continue) -> "Patience":
        """The patience of this connection, for one request; `check` may raise to end a wait."""
        return Patience(self._patience_s, check)

    def call(self, request: Callable[[], Result], patience: "Patience | None" = None) -> Result:
        """Make a request; wait and repeat while the Hub is busy, as long as patience lasts.

        Raises:
            ServiceError: what the Hub's refusal means for the caller.
        """
        patience = patience or self.new_patience()
        while True:
            try:
                return request()
            except (HfHubHTTPError, EntryNotFoundError) as error:
                if _status_of(error) not in BUSY:
                    raise _translate(error) from error
                patience.wait(error)
            except TRANSPORT_ERROR as error:
                patience.wait(error)

    def read(self, resolved: ResolvedModel, path: str, start: int, length: int) -> bytes:
        """Read a range of a file; never more, whatever the Hub sends."""

        def read_once() -> bytes:
            content = bytearray()
            with self.stream(resolved, path, start, length) as (first, chunks):
                skip = start - first
                for chunk in chunks:
                    content += chunk
                    if len(content) >= skip + length:
                        break
            return bytes(content[skip : skip + length])

        return self.call(read_once)

    @contextmanager
    def stream(
        self, resolved: ResolvedModel, path: str, start: int, length: int | None = None
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Open a file at an offset: the offset that the Hub really starts at, and the chunks."""
        url = hf_hub_url(
            resolved.model,
            path,
            repo_type=resolved.repo_type,
            revision=resolved.sha,
            endpoint=self._endpoint,
        )
        headers = build_hf_headers(token=self._token)
        # a compressed body has other offsets than the file
        headers["Accept-Encoding"] = "identity"
        end = "" if length is None else start + length - 1
        if start or length is not None:
            headers["Range"] = f"bytes={start}-{end}"
        timeout_s = min(self.timeout_s, STALL_S)
        with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
            hf_raise_for_status(response)
            is_partial = response.status_code == 206
            yield (start if is_partial else 0), response.iter_bytes()


class Patience:
    """How long one request may still wait for a busy Hub."""

    def __init__(self, budget_s: float, check: Callable[[], None]) -> None:
        self._budget_s = budget_s
        self._check = check
        self._left_s = budget_s
        self._next_s = FIRST_WAIT_S

    def renew(self) -> None:
        """Start again: something arrived."""
        self._left_s, self._next_s = self._budget_s, FIRST_WAIT_S

    def wait(self, error: Exception) -> None:
        """Sleep as long as the Hub asks, else twice as long as before.

        Raises:
            HubUnavailable: if that is longer than what is left.
        """
        asked_s = _retry_after_s(error)
        wait_s = self._next_s if asked_s is None else asked_s
        if wait_s > self._left_s:
            status = _status_of(error)
            what = f"answered {status}" if status else f"did not answer ({type(error).__name__})"
            refusal = HubUnavailable(f"The Hub {what}; try again later.")
            if asked_s is not None:
                refusal.extra["retry_after_s"] = math.ceil(asked_s)
            raise refusal from error
        log.info("hub_busy", extra={"abq_fields": {"wait_s": wait_s, "status": _status_of(error)}})
        until = time.monotonic() + wait_s
        while (left_s := until - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left_s, CHECK_INTERVAL_S))
        self._left_s -= wait_s
        self._next_s = min(2 * self._next_s, LONGEST_WAIT_S)


def _translate(error: Exception) -> ServiceError:
    # a gated repository is also one that was not found, so the order matters
    match error:
        case GatedRepoError():
            return ModelGated(param="model")
        case RepositoryNotFoundError() | DisabledRepoError():
            return ModelNotFound(param="model")
        case RevisionNotFoundError():
            return RevisionNotFound(param="revision")
        case EntryNotFoundError():
            return ModelNotFound("The model lost a file that it listed.", param="model")
        case _:
            return _translate_status(_status_of(error))


def _translate_status(status: int | None) -> ServiceError:
    if status in (401, 403):
        return ModelGated("The Hub refuses the configured token; set another.", param="model")
    if status == 416:
        return HubUnavailable("The Hub holds fewer bytes of a file than it announced.")
    return HubUnavailable(f"The Hub answered {status}.")


def _status_of(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    status: Any = getattr(response, "status_code", None)
    return int(status) if status is not None else None


def _retry_after_s(error: Exception) -> float | None:
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After") if response is not None else None
    try:
        # the form with a date is not used by the Hub
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None

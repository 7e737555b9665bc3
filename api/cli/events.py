"""A job's event stream as a client reads it: server-sent events, reconnected without a gap."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from api.cli.client import ApiClient
from api.cli.errors import ApiProblem, ServiceUnreachable

__all__ = ["JobEvent", "ServerEvent", "follow_job", "parse_server_events"]

DONE = "done"
RETRY_S = 3.0
"""Pause before a reconnect where the service names none."""
GIVE_UP_S = 300.0
"""Without an answer for this long the service counts as gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEvent:
    """One block of a `text/event-stream`."""

    id: str | None = None
    type: str = "message"
    data: str = ""
    retry_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to a job."""

    id: str | None
    type: str
    data: dict[str, Any]


def follow_job(
    client: ApiClient,
    job_id: str,
    *,
    after: str | None = None,
    on_reconnect: Callable[[float], None] = lambda _: None,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[JobEvent]:
    """Yield every event behind `after` once, in order, until the job has ended.

    A cut connection is opened again with `Last-Event-ID`; `on_reconnect` hears the pause before
    it in seconds.

    Raises:
        ApiProblem: if the service refuses the request.
        ServiceUnreachable: if nothing answers for `GIVE_UP_S`.
    """
    retry_s, silent_since = RETRY_S, time.monotonic()
    while True:
        try:
            for event in _connect(client, job_id, after):
                silent_since = time.monotonic()
                retry_s = event.retry_s or retry_s
                after = event.id or after
                if event.type == DONE:
                    return
                if event.data:
                    yield _job_event(event)
        except ServiceUnreachable as error:
            _give_up_in_time(silent_since, job_id, error)
        except ApiProblem as problem:
            # a restarting service or a proxy before it answers 5xx for a while
            if problem.status < 500:
                raise
            _give_up_in_time(silent_since, job_id, problem)
        on_reconnect(retry_s)
        pause(retry_s)


def _connect(client: ApiClient, job_id: str, after: str | None) -> Iterator[ServerEvent]:
    headers = {"Accept": "text/event-stream"}
    if after is not None:
        headers["Last-Event-ID"] = after
    path = f"/v1/quantizations/{job_id}/events"
    with client.stream("GET", path, headers=headers) as response:
        yield from parse_server_events(response.iter_lines())


def parse_server_events(lines: Iterable[str]) -> Iterator[ServerEvent]:
    """Read blocks of `field: value` lines that end with an empty line; comments are left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if fields:
                yield _server_event(fields)
            fields = {}
            continue
        name, _, value = line.partition(":")
        if not name:
            continue
        value = value.removeprefix(" ")
        if name == "data" and name in fields:
            # several data lines are one text
            value = f"{fields[name]}\n{value}"
        fields[name] = value


def _server_event(fields: dict[str, str]) -> ServerEvent:
    retry = fields.get("retry", "")
    return ServerEvent(
        id=fields.get("id"),
        type=fields.get("event", "message"),
        data=fields.get("data", ""),
        retry_s=int(retry) / 1000 if retry.isdecimal() else None,
    )


def _job_event(event: ServerEvent) -> JobEvent:
    record = json.loads(event.data)
    return JobEvent(id=event.id, type=event.type, data=record["data"])


def _give_up_in_time(silent_since: float, job_id: str, cause: Exception) -> None:
    if time.monotonic() - silent_since > GIVE_UP_S:
        message = (
            f"the service has been silent for {GIVE_UP_S:.0f} s; go on later: abq watch {job_id}"
        )
        raise ServiceUnreachable(message) from cause

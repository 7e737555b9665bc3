"""`abq watch`: follow a job until it ends, as a live picture, as lines, or as JSON."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from api.cli.client import ApiClient
from api.cli.connection import JsonFlag
from api.cli.events import JobEvent, follow_job
from api.cli.job_text import job_facts
from api.cli.output import facts_table, print_json, print_table, remark
from api.cli.progress import JobPicture, event_line
from api.cli.session import open_client

__all__ = ["watch_app", "watch_job"]

watch_app = typer.Typer(add_completion=False)


@watch_app.command()
def watch(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(help="For example job_01...")],
    *,
    json_output: JsonFlag = False,
) -> None:
    """Follow a job until it ends; exit code 1 if it fails or is cancelled. Ctrl-C only looks away.

    With --json: one event a line, and the job on the last one.
    """
    with open_client(context) as client:
        job = watch_job(client, job_id, json_output=json_output)
    if json_output:
        print_json(job, indent=None)
    else:
        print_table(facts_table(job_facts(job), title=job["id"]))
    if job["status"] != "succeeded":
        raise typer.Exit(1)


def watch_job(client: ApiClient, job_id: str, *, json_output: bool = False) -> dict[str, Any]:
    """Show the job's events on stderr, or as JSON lines on stdout, and return the ended job."""
    job = client.get(f"/v1/quantizations/{job_id}")
    title = f"{job['model']} {job['notation']}"
    if json_output:
        for event in follow_job(client, job_id):
            print_json({"id": event.id, "type": event.type, "data": event.data}, indent=None)
    elif sys.stderr.isatty():
        _show_picture(client, job_id, JobPicture(title))
    else:
        _show_lines(follow_job(client, job_id, on_reconnect=_say_reconnect))
    return client.get(f"/v1/quantizations/{job_id}")


def _show_picture(client: ApiClient, job_id: str, picture: JobPicture) -> None:
    def note(pause_s: float) -> None:
        picture.remark = f"connection lost; trying again in {pause_s:.0f} s"
        live.refresh()

    with Live(picture, console=Console(stderr=True), refresh_per_second=8) as live:
        for event in follow_job(client, job_id, on_reconnect=note):
            picture.apply(event)


def _show_lines(events: Iterator[JobEvent]) -> None:
    for event in events:
        line = event_line(event)
        if line is not None:
            remark(line)


def _say_reconnect(pause_s: float) -> None:
    remark(f"connection lost; trying again in {pause_s:.0f} s")

"""`abq jobs`: list, show, cancel and retry."""

from typing import Annotated

import typer

from api.cli.connection import JsonFlag
from api.cli.job_text import job_facts, job_row, layer_row
from api.cli.output import facts_table, list_table, print_json, print_table, status_text
from api.cli.pairs import read_pairs
from api.cli.session import open_client

__all__ = ["jobs_app"]

jobs_app = typer.Typer(add_completion=False, help="List, show, cancel and retry jobs.")

JobId = Annotated[str, typer.Argument(help="For example job_01...")]
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", help="name=value; repeatable.")]


@jobs_app.callback(invoke_without_command=True)
def default(context: typer.Context, *, json_output: JsonFlag = False) -> None:
    """List, show, cancel and retry jobs."""
    if context.invoked_subcommand is None:
        list_jobs(context, json_output=json_output)
    elif json_output:
        raise typer.BadParameter(f"write it behind {context.invoked_subcommand}")


@jobs_app.command("list")
def list_jobs(
    context: typer.Context,
    *,
    status: Annotated[str | None, typer.Option(help="Only jobs in this status.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    label: Labels = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    json_output: JsonFlag = False,
) -> None:
    """List jobs, newest first."""
    labels = {f"label.{name}": value for name, value in read_pairs(label, "--label").items()}
    with open_client(context) as client:
        filters = {"status": status, "model": model, **labels}
        jobs = client.pages("/v1/quantizations", filters, limit)
    if json_output:
        print_json(jobs)
        return
    if not jobs:
        print_table(facts_table({"no jobs": "start one: abq quantize MODEL w4a8 --watch"}))
        return
    columns = ("job", "~model", "bits", "status", ">perplexity", "created")
    print_table(list_table(columns, map(job_row, jobs)))


@jobs_app.command("show")
def show_job(
    context: typer.Context,
    job_id: JobId,
    *,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer's losses too.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show one job: what was asked, promised, measured."""
    with open_client(context) as client:
        job = client.get(f"/v1/quantizations/{job_id}")
        rows = client.get(f"/v1/quantizations/{job_id}/layers")["data"] if layers else []
    if json_output:
        print_json({**job, "layers": rows} if layers else job)
        return
    print_table(facts_table(job_facts(job), title=job["id"]))
    if rows:
        columns = (">layer", "~name", ">loss, rounded", ">loss, trained", ">change", ">time")
        print_table(list_table(columns, map(layer_row, rows)))


@jobs_app.command("cancel")
def cancel_job(context: typer.Context, job_id: JobId, *, json_output: JsonFlag = False) -> None:
    """Stop a job; its layer checkpoints stay for a retry."""
    _change(context, job_id, "cancel", json_output=json_output)


@jobs_app.command("retry")
def retry_job(context: typer.Context, job_id: JobId, *, json_output: JsonFlag = False) -> None:
    """Run a failed or cancelled job again, from its last finished layer."""
    _change(context, job_id, "retry", json_output=json_output)


def _change(context: typer.Context, job_id: str, verb: str, *, json_output: bool) -> None:
    with open_client(context) as client:
        job = client.post(f"/v1/quantizations/{job_id}/{verb}")
    if json_output:
        print_json(job)
    else:
        print_table(facts_table({job["id"]: status_text(job["status"])}))

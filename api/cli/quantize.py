"""`abq quantize`: ask for a quantization, or only what it would take."""

import json
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from api.cli.connection import JsonFlag
from api.cli.errors import CliError
from api.cli.job_text import estimate_facts, job_facts
from api.cli.output import facts_table, print_json, print_table, remark
from api.cli.pairs import read_pairs, read_settings
from api.cli.session import open_client
from api.cli.watch import watch_job
from engine.datasets import TaskFamily
from engine.errors import SpecError
from engine.spec import QuantSpec

__all__ = ["quantize_app"]

quantize_app = typer.Typer(add_completion=False)


@quantize_app.command()
def quantize(  # noqa: PLR0913 - each option is a parameter
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="owner/name, or local:ROOT/FOLDER.")],
    spec: Annotated[str, typer.Argument(help="w4a8, w2*a8, w3a16g64kv8, or a JSON file.")],
    *,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the spec, as calibration.epochs=4; repeatable."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    windows: Annotated[
        int, typer.Option(min=0, help="Windows of text that perplexity is measured on; 0: none.")
    ] = 4,
    window_length: Annotated[int, typer.Option(min=16, help="Tokens in each of them.")] = 1024,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="What to measure on: builtin, wikitext2, c4, ptb, local:..."),
    ] = None,
    task: Annotated[
        list[TaskFamily] | None, typer.Option("--task", help="A zero-shot task; repeatable.")
    ] = None,
    publish: Annotated[str | None, typer.Option(help="Push the result to OWNER/NAME.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="name=value; repeatable.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Check and price it only.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it until it ends.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Ask for a quantization of a model; answers at once, unless --watch is given."""
    body: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "spec": read_spec(spec, setting),
        "evaluation": _evaluation(windows, window_length, text or [], task or []),
        "publish": {"repo_id": publish} if publish else None,
        "labels": read_pairs(label, "--label"),
    }
    with open_client(context) as client:
        if estimate:
            _show(client.post("/v1/quantizations/estimate", body), json_output=json_output)
            return
        # a request that is sent again after a lost answer must not start a second job
        job = client.post("/v1/quantizations", body, {"Idempotency-Key": uuid4().hex})
        if watch:
            job = watch_job(client, job["id"], json_output=json_output)
    # behind events, the job is one more line
    _show(job, json_output=json_output, indent=None if watch else 2)
    if not watch and not json_output:
        remark(f"follow it with: abq watch {job['id']}", "dim")
    if watch and job["status"] != "succeeded":
        raise typer.Exit(1)


def read_spec(text: str, settings: list[str] | None) -> str | dict[str, Any]:
    """Read the paper's notation or a JSON file, and lay single fields over it.

    Raises:
        CliError: naming the field, the value and what would do.
    """
    if not settings and not text.endswith(".json"):
        return text
    try:
        spec = _read_file(Path(text)) if text.endswith(".json") else _read_notation(text)
    except SpecError as error:
        raise CliError(str(error)) from error
    for path, value in read_settings(settings).items():
        *parents, name = path.split(".")
        group = spec
        for parent in parents:
            # a group that is not asked for, as the target, is null in the JSON of a notation
            group[parent] = group.get(parent) or {}
            group = group[parent]
        group[name] = value
    return spec


def _evaluation(
    windows: int, length: int, texts: list[str], tasks: list[TaskFamily]
) -> dict[str, Any]:
    if not windows:
        return {"enabled": False}
    return {
        "enabled": True,
        "windows": windows,
        "length": length,
        # a service of an earlier version knows neither, and refuses what it does not know
        **({"datasets": texts} if texts else {}),
        **({"tasks": [each.value for each in tasks]} if tasks else {}),
    }


def _read_notation(text: str) -> dict[str, Any]:
    return QuantSpec.from_notation(text).to_json()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CliError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise CliError(f"{path} holds no JSON object")
    return record


def _show(record: dict[str, Any], *, json_output: bool, indent: int | None = 2) -> None:
    if json_output:
        print_json(record, indent=indent)
    elif "status" in record:
        print_table(facts_table(job_facts(record), title=record["id"]))
    else:
        print_table(facts_table(estimate_facts(record), title="what it would take"))

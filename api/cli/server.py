"""`abq up` and `abq migrate`: the commands of whoever runs the service."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import make_url

from api.cli.connection import JsonFlag, connection_of
from api.cli.output import print_json, remark
from api.cli.pairs import read_pairs
from api.cli.up import run_up
from api.db.migrations import upgrade_database
from api.settings import Settings

__all__ = ["migrate_app", "up_app"]

up_app = typer.Typer(add_completion=False)
migrate_app = typer.Typer(add_completion=False)


@up_app.command()
def up(
    context: typer.Context,
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the API.")] = None,
    model_root: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: local:NAME/X is the model in FOLDER/X; repeatable."),
    ] = None,
    logs: Annotated[bool, typer.Option("--logs", help="Show all processes' log lines.")] = False,
) -> None:
    """Run API, worker and inference on this machine, with SQLite and files; Ctrl-C stops all."""
    settings = connection_of(context).settings()
    server = {"host": host, "port": port}
    given = {name: value for name, value in server.items() if value is not None}
    roots = {
        name: Path(folder).expanduser().absolute()
        for name, folder in read_pairs(model_root, "--model-root").items()
    }
    code = run_up(_with_options(settings, given, roots), show_logs=logs)
    raise typer.Exit(code)


@migrate_app.command()
def migrate(context: typer.Context, *, json_output: JsonFlag = False) -> None:
    """Bring the database of ABQ_DATABASE__URL, or of the data directory, to this version."""
    url = connection_of(context).settings().database_url
    upgrade_database(url)
    shown = make_url(url).render_as_string(hide_password=True)
    if json_output:
        print_json({"database": shown, "migrated": True})
    else:
        remark(f"{shown} has this version's tables")


def _with_options(
    settings: Settings, server: Mapping[str, object], roots: dict[str, Path]
) -> Settings:
    hub = {"model_roots": {**settings.hub.model_roots, **roots}}
    return settings.model_copy(
        update={
            "server": settings.server.model_copy(update=server),
            "hub": settings.hub.model_copy(update=hub),
        }
    )

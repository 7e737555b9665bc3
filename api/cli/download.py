"""`abq download`: fetch a finished checkpoint and verify every byte."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from api.cli.client import ApiClient
from api.cli.connection import JsonFlag
from api.cli.output import facts_table, print_json, print_table
from api.cli.quantities import bytes_text
from api.cli.session import open_client
from api.cli.transfer import OnBytes, fetch_files
from api.cli.verify import verify_folder

__all__ = ["download_app", "download_artifact"]

download_app = typer.Typer(add_completion=False)


@download_app.command()
def download(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(help="For example job_01...")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; the job's id if not given.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=16, help="Files at a time.")] = 4,
    json_output: JsonFlag = False,
) -> None:
    """Fetch a finished checkpoint and verify it; run it again to go on after an interruption."""
    folder = output or Path(job_id)
    with open_client(context) as client:
        artifact = download_artifact(client, job_id, folder, workers=parallel)
    manifest = verify_folder(folder, artifact["manifest_sha256"])
    if json_output:
        facts = {"folder": str(folder), "verified": True, "manifest": manifest}
        print_json({"artifact_id": artifact["id"], **facts})
        return
    print_table(
        facts_table(
            {
                "folder": str(folder),
                "files": f"{len(artifact['files'])}, {bytes_text(artifact['bytes'])}",
                "verified": "every sha256 is that of the manifest",
                "bits per weight": f"{artifact['bits_per_weight']:.3f}",
                "manifest sha256": artifact["manifest_sha256"],
            },
            title=artifact["id"],
        )
    )


def download_artifact(
    client: ApiClient, job_id: str, folder: Path, *, workers: int = 4
) -> dict[str, Any]:
    """Fetch all files of a job's artifact, showing a bar on stderr, and return the artifact."""
    artifact = client.get(f"/v1/quantizations/{job_id}/artifacts")
    files = artifact["files"]
    with _bar(sum(file["bytes"] for file in files)) as on_bytes:
        fetch_files(client, files, folder, workers=workers, on_bytes=on_bytes)
    return artifact


@contextmanager
def _bar(total: int) -> Iterator[OnBytes]:
    columns = (TextColumn("download"), BarColumn(bar_width=36), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), console=console) as progress:
        task = progress.add_task("download", total=total)
        yield lambda count: progress.advance(task, count)

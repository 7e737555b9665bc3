"""`abq deploy`: host a finished checkpoint; list and delete what is hosted."""

import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup
from typing_extensions import override

from api.cli.client import ApiClient
from api.cli.connection import JsonFlag
from api.cli.errors import CliError
from api.cli.output import facts_table, list_table, print_json, print_table, remark, status_text
from api.cli.quantities import age_text, bytes_text
from api.cli.session import open_client

__all__ = ["deploy_app", "wait_until_ready"]

READY_S = 600.0
POLL_S = 0.5


class CreateByDefault(TyperGroup):
    """`abq deploy JOB` is `abq deploy create JOB`."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Name the sub-command where none was named."""
        if args and args[0] not in {*self.commands, "-h", "--help"}:
            args = ["create", *args]
        return super().parse_args(ctx, args)


deploy_app = typer.Typer(
    add_completion=False,
    cls=CreateByDefault,
    no_args_is_help=True,
    help="Host a finished checkpoint (abq deploy JOB); list and delete what is hosted.",
)


@deploy_app.command("create")
def create(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A job's or an artifact's id.")],
    *,
    name: Annotated[str | None, typer.Option(help="What callers write as model.")] = None,
    wait: Annotated[bool, typer.Option(help="Return when it answers.")] = True,
    json_output: JsonFlag = False,
) -> None:
    """Host a finished checkpoint under a name; `create` may be left out."""
    kind = "artifact_id" if source.startswith("art_") else "quantization_id"
    with open_client(context) as client:
        deployment = client.post("/v1/deployments", {kind: source, "name": name})
        if wait:
            deployment = wait_until_ready(client, deployment["id"])
    if json_output:
        print_json(deployment)
        return
    print_table(facts_table(_facts(deployment), title=deployment["id"]))
    remark(f"talk to it with: abq chat {deployment['name']}", "dim")


@deploy_app.command("list")
def list_deployments(
    context: typer.Context,
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    json_output: JsonFlag = False,
) -> None:
    """List what is hosted."""
    with open_client(context) as client:
        deployments = client.pages("/v1/deployments", {}, limit)
    if json_output:
        print_json(deployments)
        return
    rows = [(each["name"], each["id"], *_state(each)) for each in deployments]
    columns = ("~model", "deployment", "status", ">memory", "created")
    print_table(list_table(columns, rows))


@deploy_app.command("delete")
def delete(
    context: typer.Context,
    deployment_id: Annotated[str, typer.Argument(help="The deployment's id or name.")],
    *,
    json_output: JsonFlag = False,
) -> None:
    """Host it no longer; the artifact stays."""
    with open_client(context) as client:
        known = client.pages("/v1/deployments", {}, 1000)
        ids = [each["id"] for each in known if each["name"] == deployment_id]
        answer = client.delete(f"/v1/deployments/{ids[0] if ids else deployment_id}")
    if json_output:
        print_json(answer)
    else:
        remark(f"{deployment_id} is hosted no longer")


def wait_until_ready(
    client: ApiClient, deployment_id: str, *, pause: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Poll until the model is loaded.

    Raises:
        CliError: if it cannot be loaded, or not in `READY_S`.
    """
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        deployment = client.get(f"/v1/deployments/{deployment_id}")
        if deployment["status"] in ("ready", "idle"):
            return deployment
        if deployment["status"] == "failed":
            raise CliError(f"{deployment['name']} could not be loaded: {deployment['error']}")
        pause(POLL_S)
    raise CliError(f"{deployment_id} was not loaded within {READY_S:.0f} s; see the service's log")


def _facts(deployment: dict[str, Any]) -> dict[str, str | Text]:
    status, memory, created = _state(deployment)
    return {
        "model": deployment["name"],
        "status": status,
        "artifact": deployment["artifact_id"],
        "memory": memory,
        "created": created,
    }


def _state(deployment: dict[str, Any]) -> tuple[Text, str, str]:
    memory = bytes_text(deployment["memory_bytes"])
    return status_text(deployment["status"]), memory, age_text(deployment["created_at"])

"""`abq keys`: list, create and revoke API keys."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from api.cli.connection import JsonFlag
from api.cli.output import facts_table, list_table, print_json, print_table, remark
from api.cli.quantities import age_text
from api.cli.session import open_client

__all__ = ["keys_app"]

keys_app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="List, create and revoke API keys."
)


@keys_app.command("list")
def list_keys(
    context: typer.Context,
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    json_output: JsonFlag = False,
) -> None:
    """List keys; their secrets are stored nowhere."""
    with open_client(context) as client:
        keys = client.pages("/v1/api_keys", {}, limit)
    if json_output:
        print_json(keys)
        return
    rows = [
        (
            each["name"],
            each["id"],
            f"{each['prefix']}…",
            " ".join(each["scopes"]),
            "revoked" if each["revoked_at"] else age_text(each["last_used_at"]),
            age_text(each["created_at"]),
        )
        for each in keys
    ]
    print_table(list_table(("~name", "id", "key", "~scopes", "last used", "created"), rows))


@keys_app.command("create")
def create_key(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What it is for.")],
    *,
    scope: Annotated[
        list[str],
        typer.Option(
            "--scope",
            help="quant:read, quant:write, artifacts:read, deploy:write, infer:invoke, "
            "keys:admin or admin; repeatable.",
        ),
    ],
    days: Annotated[
        int | None, typer.Option(min=1, help="Valid this long; none: for good.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Create a key; it is shown this once."""
    expires = (datetime.now(UTC) + timedelta(days=days)).isoformat() if days else None
    body = {"name": name, "scopes": scope, "expires_at": expires}
    with open_client(context) as client:
        key = client.post("/v1/api_keys", body)
    if json_output:
        print_json(key)
        return
    print_table(
        facts_table({"key": key["key"], "scopes": " ".join(key["scopes"])}, title=key["id"])
    )
    remark("keep it now: it cannot be shown again", "yellow")


@keys_app.command("revoke")
def revoke_key(
    context: typer.Context,
    key_id: Annotated[str, typer.Argument(help="For example key_01...")],
    *,
    json_output: JsonFlag = False,
) -> None:
    """Make a key worthless at once."""
    with open_client(context) as client:
        answer = client.delete(f"/v1/api_keys/{key_id}")
    if json_output:
        print_json(answer)
    else:
        remark(f"{key_id} is revoked")

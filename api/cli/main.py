"""The `abq` command: options that every command shares; a command's module loads on its use."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from api.cli.connection import Connection
from api.cli.errors import CliError

__all__ = ["main"]

COMMANDS = {
    "up": "Run the whole service on this machine; Ctrl-C stops it.",
    "quantize": "Ask for a quantization of a model.",
    "jobs": "List, show, cancel and retry jobs.",
    "watch": "Follow a job until it ends.",
    "download": "Fetch a finished checkpoint and verify every byte.",
    "deploy": "Host a finished checkpoint; list and delete what is hosted.",
    "chat": "Talk to a hosted model.",
    "keys": "List, create and revoke API keys.",
    "migrate": "Bring the database to this version's tables.",
    "demo": "Quantize, host and chat with a small real model, from nothing.",
}
MODULES = {"up": "server", "migrate": "server"}
"""Commands whose module has another name than the command."""


class LazyCommands(TyperGroup):
    """Knows the names and help lines of all commands, and imports only the one that runs."""

    @override
    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order in which a new user meets them."""
        return list(COMMANDS)

    @override
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in that only help pages read."""
        summary = COMMANDS.get(cmd_name)
        return summary and TyperCommand(cmd_name, help=summary, callback=None)

    @override
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Load the command that was named; unknown names are refused by the base class."""
        name = args[0]
        if name not in COMMANDS:
            return super().resolve_command(ctx, args)
        module = import_module(f"api.cli.{MODULES.get(name, name)}")
        command = typer.main.get_command(getattr(module, f"{name}_app"))
        command.name = name
        return name, command, args[1:]


app = typer.Typer(
    cls=LazyCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def connect(
    context: typer.Context,
    *,
    url: Annotated[
        str | None, typer.Option(envvar="ABQ_URL", help="Address of the service.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="ABQ_API_KEY", help="API key.", show_envvar=True)
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="ABQ_DATA_DIR", help="Where abq up keeps its data and first key."),
    ] = None,
) -> None:
    """Quantize language models to any bit width, watch, download, host and chat with them."""
    context.obj = Connection(url=url, api_key=key, data_dir=data_dir)


def main() -> None:
    """Run the command line; what stops a command is one line on stderr and exit code 1."""
    try:
        app()
    except CliError as error:
        sys.stderr.write(f"abq: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)

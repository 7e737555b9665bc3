"""Options that every command shares: which service, which key, and whether a program reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli.config import DEFAULT_URL, read_client_config
from api.cli.errors import CliError

if TYPE_CHECKING:
    from api.settings import Settings

__all__ = ["Connection", "JsonFlag", "connection_of"]

JsonFlag = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, nothing else.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What was given before the command's name, or in the environment."""

    url: str | None
    api_key: str | None
    data_dir: Path | None

    def settings(self) -> "Settings":
        """The operator's settings, for commands that run on the service's machine."""
        # only some commands need them, and reading them costs a third of the start
        from api.settings import Settings  # noqa: PLC0415

        return Settings() if self.data_dir is None else Settings(data_dir=self.data_dir)

    def address_and_key(self) -> tuple[str, str | None]:
        """Whom to ask: options and environment first, then what `abq up` left."""
        if self.url and self.api_key:
            return self.url, self.api_key
        try:
            left = read_client_config(self.settings().data_dir)
        except ValueError as error:
            raise CliError(str(error)) from error
        url = self.url or left.url or DEFAULT_URL
        # a key is for the service that made it, never for another address
        key = left.api_key if url.rstrip("/") == left.url.rstrip("/") else None
        return url, self.api_key or key


def connection_of(context: typer.Context) -> Connection:
    """The shared options of a running command."""
    connection = context.find_object(Connection)
    if connection is None:
        raise CliError("this command runs under abq only")
    return connection

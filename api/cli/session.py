"""A client opened from the options that a command was given."""

import typer

from api.cli.client import ApiClient
from api.cli.connection import connection_of

__all__ = ["open_client"]


def open_client(context: typer.Context) -> ApiClient:
    """Connect to the service that the shared options name."""
    url, key = connection_of(context).address_and_key()
    return ApiClient(url, key)

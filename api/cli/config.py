"""What a client must know of a service: its address and a key, from options or a file.

`abq up` writes the file into its data directory: a shell on the same machine needs no set-up.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["CLIENT_FILE", "ClientConfig", "read_client_config", "write_client_config"]

CLIENT_FILE = "client.json"
DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Where the service listens and who asks."""

    url: str = DEFAULT_URL
    api_key: str | None = None


def read_client_config(data_dir: Path) -> ClientConfig:
    """Read what `abq up` left in its data directory; the defaults where it left nothing.

    Raises:
        ValueError: if the file is there but holds something else.
    """
    path = data_dir / CLIENT_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ClientConfig()
    try:
        return ClientConfig(url=str(record["url"]), api_key=record["api_key"])
    except (KeyError, TypeError) as error:
        message = f"{path} is no client configuration; delete it and run abq up again"
        raise ValueError(message) from error


def write_client_config(data_dir: Path, config: ClientConfig) -> Path:
    """Write the file atomically, readable by its owner only, and return its path."""
    path = data_dir / CLIENT_FILE
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    # the key must never be readable by others, not even before a chmod
    handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(asdict(config), file)
    unfinished.replace(path)
    return path

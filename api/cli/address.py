"""Where a process of the one-machine form listens, and whether it does."""

import http.client
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from api.cli.errors import CliError
from api.settings import Settings

__all__ = ["Address", "api_address", "inference_address"]

PROBE_TIMEOUT_S = 2.0
EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A host and a port on this machine."""

    name: str
    host: str
    port: int
    setting: str
    """The environment variable that moves it."""

    @property
    def url(self) -> str:
        """What a client on this machine calls."""
        host = EVERY_INTERFACE.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def check_free(self) -> None:
        """Refuse a port that something listens on.

        Raises:
            CliError: naming the setting that moves it.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            # what a server that ended a moment ago left behind is no listener
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                message = (
                    f"the {self.name} cannot listen on {self.host}:{self.port}"
                    f" ({error.strerror}); set {self.setting}"
                )
                raise CliError(message) from error

    def answers(self, path: str) -> bool:
        """Whether a GET of the path is answered with 200."""
        host = EVERY_INTERFACE.get(self.host, self.host)
        connection = http.client.HTTPConnection(host, self.port, timeout=PROBE_TIMEOUT_S)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def api_address(settings: Settings) -> Address:
    """Where the API listens."""
    server = settings.server
    return Address(name="API", host=server.host, port=server.port, setting="ABQ_SERVER__PORT")


def inference_address(settings: Settings) -> Address:
    """Where the inference process listens."""
    url = urlsplit(settings.inference.url)
    return Address(
        name="inference process",
        host=url.hostname or "127.0.0.1",
        port=url.port or 80,
        setting="ABQ_INFERENCE__URL",
    )

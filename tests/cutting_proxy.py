"""A TCP proxy that cuts a connection after so many bytes of answer, as bad networks do."""

import contextlib
import math
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

__all__ = ["CuttingProxy", "run_cutting_proxy"]


@dataclass
class CuttingProxy:
    """What the proxy does to the next connections, and what it saw of them."""

    url: str
    target: tuple[str, int]
    cuts: list[int] = field(default_factory=list)
    """Answer bytes after which a connection ends; one entry a connection, then none is cut."""
    requests: list[bytes] = field(default_factory=list)
    """The first bytes of every connection."""
    passed: list[int] = field(default_factory=list)
    """Answer bytes of every connection."""

    def serve(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client):
        allowed = self.cuts.pop(0) if self.cuts else math.inf
        index = len(self.passed)
        self.passed.append(0)
        with client, socket.create_connection(self.target) as server:
            up = threading.Thread(target=self._send_up, args=(client, server), daemon=True)
            up.start()
            with contextlib.suppress(OSError):
                while self.passed[index] < allowed:
                    answer = server.recv(min(65536, allowed - self.passed[index]))
                    if not answer:
                        break
                    client.sendall(answer)
                    self.passed[index] += len(answer)
            # closing alone reaches nobody while the other thread waits in recv
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _send_up(self, client, server):
        is_first = True
        with contextlib.suppress(OSError):
            while request := client.recv(65536):
                if is_first:
                    self.requests.append(request)
                is_first = False
                server.sendall(request)
            server.shutdown(socket.SHUT_WR)


@contextmanager
def run_cutting_proxy(url):
    """Yield a proxy in front of a server; it stops with the block."""
    parts = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        own = f"http://127.0.0.1:{listener.getsockname()[1]}"
        proxy = CuttingProxy(url=own, target=(parts.hostname, parts.port))
        thread = threading.Thread(target=proxy.serve, args=(listener,), daemon=True)
        thread.start()
        yield proxy
        # closing alone does not wake a thread that waits in accept
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()

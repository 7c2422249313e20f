"""Where a server listens. No torch here, so that a port in use is told at once."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

from flextron.errors import FlextronError

_BACKLOG = 1024


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at this address; port 0 takes a free one.

    Raises:
        FlextronError: the port is in use, or the address is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise FlextronError(f"cannot serve at {host}: {error.strerror or error}; choose another --host.") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)  # here, as two sockets may be bound to one port, but not listen
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise FlextronError(f"port {port} of {host} is in use; choose another with --port.") from None
        raise FlextronError(f"cannot serve at {host}:{port}: {error.strerror or error}.") from None
    return listening


def address_of(listening: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = listening.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{name}:{port}"

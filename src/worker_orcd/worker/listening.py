"""The socket that the worker listens on, bound before anything else so that a taken port is told at once."""

from __future__ import annotations

import socket

from worker_orcd.config import ServerConfig
from worker_orcd.errors import InvalidConfiguration

_BACKLOG = 1024
_WILDCARDS = ("0.0.0.0", "::", "")


def listen(config: ServerConfig) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises InvalidConfiguration."""
    try:
        family, _kind, _protocol, _name, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name that could be looked up
        reason = error.strerror if isinstance(error, OSError) else "it is not a host name"
        raise InvalidConfiguration(
            f"cannot listen on {config.host} port {config.port}: {reason or error}"
        ) from None
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """What is bound: `0.0.0.0` where the worker listens everywhere."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uri_of(listener: socket.socket, config: ServerConfig) -> str:
    """Where others find the worker: the host it was told to listen on, or this machine's name for all."""
    host = socket.gethostname() if config.host in _WILDCARDS else config.host
    port: int = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

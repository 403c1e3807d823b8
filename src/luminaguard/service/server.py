"""Serves the application; TLS wherever others than this machine could connect."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import uvicorn

from luminaguard.errors import SettingsError

__all__ = ["Server"]


class Server(uvicorn.Server):
    """A server of one application; ``should_exit`` ends it.

    Args:
        app: what is served.
        listen: ADDRESS:PORT.
        lifespan: whether the application wants to be told of its beginning and end.
        most: connections at once.
        certificate, key: PEM files; without them, only this machine is listened to.

    Raises:
        SettingsError: the address cannot be used, or is open to others without TLS.
    """

    def __init__(
        self, app: Any, listen: str, certificate: Path | None, key: Path | None, *,
        lifespan: Literal["on", "off"] = "off", most: int = 64,
    ) -> None:  # fmt: skip
        host, _, port = listen.rpartition(":")
        try:
            address = ipaddress.ip_address(host.strip("[]"))
            number = int(port)
        except ValueError:
            raise SettingsError(
                f"{listen!a} is not ADDRESS:PORT.", hint="For example 127.0.0.1:8443, or [::]:8443."
            ) from None
        if (certificate is None or key is None) and not address.is_loopback:
            raise SettingsError(
                f"{listen} is open to other machines, and there is no certificate.",
                hint="Give --certificate and --key, or listen on 127.0.0.1.",
            )
        for path in (certificate, key):
            if path is not None and not path.is_file():
                raise SettingsError(f"There is no file {path}.", hint="It is a certificate, or a key, in PEM.")
        config = uvicorn.Config(
            app, host=str(address), port=number, log_config=None, access_log=False, server_header=False,
            proxy_headers=False, limit_concurrency=most, timeout_keep_alive=5, http="h11",
            h11_max_incomplete_event_size=64 << 10,  # which the other parser has no limit for
            ssl_certfile=certificate, ssl_keyfile=key, lifespan=lifespan, ws="none", timeout_graceful_shutdown=5,
        )  # fmt: skip
        try:
            config.load()
        except (ssl.SSLError, OSError) as error:
            raise SettingsError(
                f"The certificate and its key cannot be used: {error}.", hint="They are PEM, and belong together."
            ) from error
        super().__init__(config)
        self._address = (str(address), number)

    async def serve_at(self, on_ready: Callable[[], None]) -> None:
        """Serve until ``should_exit``; ``on_ready`` is called once it listens.

        Raises:
            SettingsError: the address cannot be listened at.
        """
        host, port = self._address
        # With its protocol by name: asyncio sends small pieces at once only where it sees that it is TCP.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            with listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((host, port))
                listener.listen(128)
                listener.setblocking(False)
                on_ready()
                await self.serve(sockets=[listener])
        except OSError as error:
            raise SettingsError(
                f"{host}:{port} cannot be listened at: {error.strerror}.", hint="Another program may have this port."
            ) from error

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command line's."""
        yield

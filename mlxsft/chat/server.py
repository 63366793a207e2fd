"""`mlxsft serve`: a model and its adapters over HTTP, on this machine, for clients of OpenAI's API."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from mlxsft.cache import cache_folder
from mlxsft.chat.load import Loaded
from mlxsft.chat.server_api import Served, application
from mlxsft.chat.server_guard import PatientProtocol, known_host
from mlxsft.chat.server_worker import Worker
from mlxsft.errors import InputRefused, UsageError

SHORTEST_KEY = 16  # characters
CONNECTIONS = 512  # at once


@dataclass(frozen=True)
class Listening:
    """A place that takes connections, which wait there until a server answers them."""

    host: str
    socket: socket.socket

    @classmethod
    def at(cls, host: str, port: int) -> Listening:
        """`port` 0 takes any that is free. Raises UsageError where there is no listening."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return cls(host, socket.create_server((host, port), family=family))
        except OSError as error:
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            why = (error.strerror or str(error)).partition(" (while")[0]  # Python adds the address to some
            raise UsageError(
                f"{host}, port {port}: cannot be listened on: {why}",
                "Name another --port; 0 takes any that is free."
                if taken
                else "Name a --host of this machine: 127.0.0.1 for itself alone, 0.0.0.0 for all of its addresses.",
            ) from error

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def url(self) -> str:
        """The address in a browser on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.socket.getsockname()[1]}"

    @property
    def is_local(self) -> bool:
        """Whether other machines are kept out."""
        address = self.socket.getsockname()[0]
        return ipaddress.ip_address(address).is_loopback


def read_or_make_key(file: Path | None) -> tuple[str, Path]:
    """The key in a file that only its owner can read, and the file; it is made where there is none.

    Raises InputRefused for a file that others can read, or that holds no key.
    """
    file = file or cache_folder() / "serve.key"
    try:
        return _made_key(file), file
    except FileExistsError:
        pass
    except OSError as error:
        raise InputRefused(
            f"{file}: cannot be written: {error.strerror or error}", "Name another --key-file."
        ) from error
    try:
        if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise InputRefused(f"{file}: others than its owner can read or change it", f"chmod 600 {file}")
        key = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{file}: cannot be read as a key: {error}", "Name another --key-file.") from error
    if len(key) < SHORTEST_KEY or not key.isprintable() or " " in key:
        raise InputRefused(
            f"{file}: holds no key, which has at least {SHORTEST_KEY} characters and no space", "Remove the file."
        )
    return key, file


def _made_key(file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    key = f"mlxsft-{secrets.token_urlsafe(24)}"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as out:
        out.write(f"{key}\n")
    return key


def served_models(loaded: Loaded) -> dict[str, Served]:
    """The base and its adapters by the names that requests give them; a base in a folder has the folder's.

    Raises UsageError where an adapter is called as the base is.
    """
    source, renderers = loaded.source, loaded.renderers
    base = source.name if source.commit else source.folder.resolve().name
    if base in renderers:
        raise UsageError(f"--adapter {base}: the model itself has this name", "Give the adapter another one.")
    return {(adapter or base): Served(adapter or base, adapter, renderer) for adapter, renderer in renderers.items()}


class ModelServer:
    """A loaded model behind HTTP; `run` answers until it is told to stop."""

    def __init__(
        self, worker: Worker, models: Mapping[str, Served], listening: Listening, *, key: str, max_tokens: int
    ) -> None:
        self._worker, self._socket = worker, listening.socket
        app = application(worker, models, key=key, known_host=known_host(listening.host), max_tokens=max_tokens)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # no header can say who asks
                server_header=False,
                limit_concurrency=CONNECTIONS,
            )
        )

    def run(self) -> None:
        """Answer until SIGINT, SIGTERM or `stop`; then take no new request, and finish the answers in flight."""
        try:
            self._server.run([self._socket])
        finally:
            self._worker.stop()

    def stop(self) -> None:
        """Have `run` end, from any thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        os.write(2, b"\nFinishing the answers in flight; Ctrl-C ends them.\n")
        super().handle_exit(sig, frame)

"""A server of ours on this machine, in a thread of the tests' process."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from openai import OpenAI

from mlxsft.backends import Backend
from mlxsft.chat.load import load_for_chat
from mlxsft.chat.server import Listening, ModelServer, served_models
from mlxsft.chat.server_worker import Worker

KEY = "a-key-for-the-tests"


@dataclass(frozen=True)
class Serving:
    """How the tests reach the server."""

    listening: Listening
    backend: Backend

    @property
    def url(self) -> str:
        return self.listening.url

    @property
    def port(self) -> int:
        return int(self.listening.socket.getsockname()[1])

    def client(self, key: str = KEY) -> OpenAI:
        """The official client, which does not try again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | str | None = None,
        *,
        headers: Mapping[str, str | None] | None = None,
    ) -> tuple[int, Any]:
        """(status, body) of one plain request with the key; `headers` replace those that a client sends."""
        sent: dict[str, str | None] = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        sent |= headers or {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {k: v for k, v in sent.items() if v is not None})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text.decode()

    def load(self) -> tuple[int, int]:
        """How many answers are running and waiting."""
        _, told = self.ask("GET", "/health")
        return told["running"], told["waiting"]

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def serving(model: Path, adapters: Mapping[str, Path], backend: str = "mlx") -> Iterator[Serving]:
    """A server of a model and adapters; it is stopped at the end."""
    load = partial(load_for_chat, str(model), adapters, revision=None, template=None, backend_name=backend)
    worker = Worker(load)
    loaded = worker.start()
    with Listening.at("127.0.0.1", 0) as listening:
        server = ModelServer(worker, served_models(loaded), listening, key=KEY, max_tokens=64)
        thread = Thread(target=server.run)
        thread.start()
        try:
            yield Serving(listening, loaded.backend)
        finally:
            server.stop()
            thread.join()

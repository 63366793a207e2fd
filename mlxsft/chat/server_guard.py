"""Who may ask: checks that are made before a request is read, and limits on how it comes in.

A page of another site that this machine's browser shows must not reach the model: neither under a name of its own that
it points here (DNS rebinding, so the Host is checked), nor across origins (so is the Origin). All else needs the key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxsft.chat.server_replies import error_body
from mlxsft.chat.server_requests import Refused

MOST_BYTES = 8 << 20  # of a body
HEAD_SECONDS = 10.0  # until the head of a request is there
SEND_SECONDS = 60.0  # until a client takes what it was sent
_LOCAL = ("localhost", "127.0.0.1", "::1")


def refusal(refused: Refused) -> JSONResponse:
    """The answer to a refused request."""
    body = error_body(refused.message, status=refused.status, param=refused.param, code=refused.code)
    return JSONResponse(body, refused.status)


def known_host(bound: str) -> Callable[[str], bool]:
    """Whether a Host header, without its port, means a server that is bound to this address."""
    names = {*_LOCAL, bound.lower()}
    if bound in ("0.0.0.0", "::"):
        # Under an address nobody can be lured here by a name that changes its meaning.
        here = socket.gethostname().lower()
        names |= {here, f"{here.partition('.')[0]}.local"}
        return lambda host: host in names or _is_address(host)
    return names.__contains__


class Guard:
    """Lets a request through to the application, or refuses it."""

    def __init__(self, app: ASGIApp, key: str, known: Callable[[str], bool]) -> None:
        self._app, self._key, self._known = app, key.encode(), known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient_send(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            self._check(dict(scope["headers"]), scope["path"])
        except Refused as refused:
            return await refusal(refused)(scope, receive, patient_send)
        try:
            await self._app(scope, receive, patient_send)
        except TimeoutError:  # the connection is closed where an answer ends early
            return None

    def _check(self, headers: Mapping[bytes, bytes], path: str) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not self._known(_without_port(host)):
            raise Refused(403, f"the Host {host!r:.200} is not this server")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() != f"http://{host}":
            raise Refused(403, "requests from other origins are not taken")
        if path.startswith("/v1/"):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                raise Refused(401, "the key is wrong or missing: Authorization: Bearer KEY", code="invalid_api_key")
        if int(headers.get(b"content-length", b"0")) > MOST_BYTES:  # h11 lets nothing but digits through
            raise too_large()


def too_large() -> Refused:
    """The refusal of a body over MOST_BYTES."""
    return Refused(413, f"the body may have {MOST_BYTES >> 20} MB")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which closes a connection whose client does not get on with it.

    uvicorn waits for ever for the end of a request's head, and for that of a body that was answered already.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_watch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        head = self.conn.their_state is h11.IDLE
        rest = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if not (head or rest):
            self._end_watch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_watch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

"""The HTTP application: OpenAI's endpoints over a worker, and the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlxsft.backends import Constraint
from mlxsft.chat.generate import Answer, room_for_answer
from mlxsft.chat.json_schema import JsonSchema, Schema
from mlxsft.chat.server_guard import MOST_BYTES, Guard, refusal, too_large
from mlxsft.chat.server_replies import DONE, ChatReply, CompletionReply, Json, error_body, event
from mlxsft.chat.server_requests import ChatRequest, CompletionRequest, Refused
from mlxsft.chat.server_worker import Chosen, Job, Said, Worker
from mlxsft.chat.tool_calls import CallFormat, CallReader, call_format
from mlxsft.data.conversation import ToolCall
from mlxsft.data.render import Renderer
from mlxsft.errors import InputRefused, MlxsftError

BODY_SECONDS = 30.0  # until a body is there
MOST_WAITING = 128  # answers
_NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


@dataclass(frozen=True)
class Served:
    """A model by the name that requests give it: the base, or an adapter on it, with its template."""

    name: str
    adapter: str | None  # its name in the backend
    renderer: Renderer
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def call_format(self) -> CallFormat:
        """How its template writes calls of tools. Raises InputRefused where it has none that can be read."""
        return call_format(self.renderer)

    def told(self) -> Json:
        """Its entry in the list of models."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "mlxsft"}


@dataclass
class Asked:
    """An answer that is about to be computed: what is asked of the worker, and how it is told."""

    job: Job
    inbox: Inbox
    reply: ChatReply | CompletionReply
    calls: CallReader | None
    stream: bool
    include_usage: bool


def application(
    worker: Worker, models: Mapping[str, Served], *, key: str, known_host: Callable[[str], bool], max_tokens: int
) -> Starlette:
    """The application; `models` by name, `max_tokens` of an answer where a request does not say."""
    api = _Api(worker, models, max_tokens)
    page = _Page()
    return Starlette(
        routes=[
            Route("/", page.show),
            Route("/health", api.health),
            Route("/v1/models", api.list_models),
            Route("/v1/models/{name:path}", api.one_model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, key=key, known=known_host)],
        exception_handlers={
            Refused: _refused,
            MlxsftError: _refused,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _bug,
        },
    )


class _Api:
    def __init__(self, worker: Worker, models: Mapping[str, Served], max_tokens: int) -> None:
        self._worker, self._models, self._max_tokens = worker, models, max_tokens

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self._worker.running, "waiting": self._worker.waiting})

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [served.told() for served in self._models.values()]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._model(request.path_params["name"]).told())

    async def chat(self, request: Request) -> Response:
        body, inbox = await _body(request), Inbox()
        return await self._answer(request, await run_in_threadpool(self._chat, body, inbox))

    async def complete(self, request: Request) -> Response:
        body, inbox = await _body(request), Inbox()
        return await self._answer(request, await run_in_threadpool(self._completion, body, inbox))

    def _model(self, name: str) -> Served:
        if name not in self._models:
            raise Refused(404, f"The model {name!r:.200} does not exist", param="model", code="model_not_found")
        return self._models[name]

    # ---- what is asked, in a thread of the pool: reading and rendering 8 MB takes its time

    def _chat(self, body: bytes, inbox: Inbox) -> Asked:
        asked = ChatRequest.parse(body)
        served, tools, top, schema = self._model(asked.model), asked.offered(), asked.top(), asked.json_schema()
        renderer = served.renderer
        several = asked.parallel_tool_calls is not False
        calls = CallReader(served.call_format, tools, renderer.tokenizer, several=several) if tools else None
        prompt = renderer.prompt(asked.turns(), tools)
        job = Job(
            adapter=served.adapter,
            renderer=renderer,
            prompt=prompt,
            sampling=asked.sampling(),
            max_tokens=self._room(prompt, renderer, asked.most_tokens()),
            deliver=inbox.deliver,
            opening=renderer.opening,
            stops=asked.stop or (),
            special=calls is not None and served.call_format.special,
            top=top,
            constraint=None if schema is None else _constraint(renderer, schema),
        )
        reply = ChatReply(served.name, bool(asked.stream), renderer.tokenizer, top)
        return Asked(job, inbox, reply, calls, bool(asked.stream), asked.include_usage)

    def _completion(self, body: bytes, inbox: Inbox) -> Asked:
        asked = CompletionRequest.parse(body)
        served = self._model(asked.model)
        renderer, given = served.renderer, asked.one_prompt()
        prompt = renderer.plain_prompt(given) if isinstance(given, str) else renderer.checked_prompt(given)
        job = Job(
            adapter=served.adapter,
            renderer=renderer,
            prompt=prompt,
            sampling=asked.sampling(),
            max_tokens=self._room(prompt, renderer, asked.most_tokens()),
            deliver=inbox.deliver,
            stops=asked.stop or (),
            top=asked.logprobs,
        )
        reply = CompletionReply(served.name, bool(asked.stream), renderer.tokenizer, asked.logprobs)
        return Asked(job, inbox, reply, None, bool(asked.stream), asked.include_usage)

    def _room(self, prompt: list[int], renderer: Renderer, most: int | None) -> int:
        wanted = most or self._max_tokens
        try:
            return min(wanted, room_for_answer(prompt, renderer.positions, wanted))
        except InputRefused as refused:
            raise Refused(400, refused.message, param="messages", code="context_length_exceeded") from refused

    # ---- the answer

    async def _answer(self, request: Request, asked: Asked) -> Response:
        if self._worker.waiting >= MOST_WAITING:
            raise Refused(429, f"{MOST_WAITING} requests are waiting; try again later", code="rate_limit_exceeded")
        if asked.stream:
            return _EventStream(self._events(asked), asked.job)
        whole = asyncio.ensure_future(self._whole(asked))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            return JSONResponse(whole.result())
        finally:
            for task in (whole, gone):
                task.cancel()

    async def _whole(self, asked: Asked) -> Json:
        text, tokens = "", list[Chosen]()
        async with aclosing(self._said(asked)) as stretches:
            async for said in stretches:
                if isinstance(said, Said):
                    text += said.text
                    tokens += said.tokens
                    continue
                answer, calls = said
                return asked.reply.whole(text, calls, tokens, answer)
        raise AssertionError("an answer always ends")

    async def _events(self, asked: Asked) -> AsyncIterator[str]:
        reply = asked.reply
        for chunk in reply.begin():
            yield event(chunk)
        try:
            async with aclosing(self._said(asked)) as stretches:
                async for said in stretches:
                    if isinstance(said, Said):
                        yield event(reply.said(said.text, said.tokens))
                        continue
                    answer, calls = said
                    for chunk in reply.end(calls, answer):
                        yield event(chunk)
                    if asked.include_usage:
                        yield event(reply.used(answer))
        except (Refused, MlxsftError) as refused:
            yield event(_error_of(refused)[0])
        except Exception:  # the worker has said what it was
            yield event(error_body(_BUG, status=500))
        yield DONE

    async def _said(self, asked: Asked) -> AsyncGenerator[Said | tuple[Answer, list[ToolCall]], None]:
        """The stretches of text, and at the end the answer with its calls. Closed early, it ends the answer."""
        self._worker.submit(asked.job)
        try:
            while not isinstance(item := await asked.inbox.next(), Answer):
                text = item.text if asked.calls is None else asked.calls.push(item.text)
                if text or item.tokens:
                    yield Said(text, item.tokens)
            text, calls = asked.calls.finish() if asked.calls is not None else ("", [])
            if text:
                yield Said(text)
            yield item, calls
        finally:
            asked.job.cancelled.set()


def _constraint(renderer: Renderer, schema: Schema) -> Constraint:
    """What keeps an answer to a schema. Raises Refused for one that cannot be used."""
    try:
        return JsonSchema(renderer, schema).constraint()
    except MlxsftError as error:
        raise Refused(400, _sentences(error), param="response_format") from error


class Inbox:
    """What a worker delivers, for the event loop in which this was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Said | Answer | BaseException] = asyncio.Queue()

    def deliver(self, item: Said | Answer | BaseException) -> None:
        """Put something in, from any thread."""
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def next(self) -> Said | Answer:
        """What comes next. Raises what was delivered as an exception."""
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item


class _EventStream(StreamingResponse):
    """An answer as it comes; it ends where the client goes away, whoever waits for whom at that moment."""

    def __init__(self, events: AsyncIterator[str], job: Job) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_NO_STORE)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled.set()


# ---- requests and errors --------------------------------------------------------------------------------------------


async def _body(request: Request) -> bytes:
    """The body, in JSON by its type. Raises Refused where it is another, too large, or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the Content-Type of the body must be application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    raise too_large()
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS:g} s") from None
    return b"".join(parts)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


_BUG = "the server failed at this request; its terminal says more"


def _sentences(error: MlxsftError) -> str:
    return f"{error.message}. {error.hint}" if error.hint else error.message


def _error_of(error: Exception) -> tuple[Json, int]:
    if isinstance(error, MlxsftError):
        error = Refused(400, _sentences(error))
    assert isinstance(error, Refused)
    return error_body(error.message, status=error.status, param=error.param, code=error.code), error.status


async def _refused(request: Request, error: Exception) -> Response:
    body, status = _error_of(error)
    return JSONResponse(body, status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "there is nothing at this path", 405: f"{request.method} is not for this path"}
    return refusal(Refused(error.status_code, known.get(error.status_code, str(error.detail))))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(_BUG, status=500), 500)


# ---- the page -------------------------------------------------------------------------------------------------------


class _Page:
    """The page to chat and compare in; it is allowed its own script and style, and this server."""

    def __init__(self) -> None:
        self._html = (resources.files("mlxsft.chat") / "server_page.html").read_text(encoding="utf-8")
        policy = {
            "default-src": "'none'",
            "script-src": self._hash("script"),
            "style-src": self._hash("style"),
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        self._headers = _NO_STORE | {
            "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "Referrer-Policy": "no-referrer",
        }

    async def show(self, request: Request) -> Response:
        return HTMLResponse(self._html, headers=self._headers)

    def _hash(self, tag: str) -> str:
        """What the one element of this name is known by: https://www.w3.org/TR/CSP3/#match-element-to-source-list."""
        found = re.search(f"<{tag}>(.*?)</{tag}>", self._html, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

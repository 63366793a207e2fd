"""Answers in OpenAI's layout, whole and in chunks.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

from mlxsft.chat.generate import Answer
from mlxsft.chat.server_worker import Chosen
from mlxsft.data.conversation import ToolCall
from mlxsft.data.tokenizer import Tokenizer

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0  # OpenAI's for what is next to impossible; JSON has no infinity
DONE = "data: [DONE]\n\n"


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> Json:
    """An error as OpenAI's clients read it."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"


def usage(answer: Answer) -> Json:
    """The tokens of an answer."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }


@dataclass
class Reply:
    """One answer: `said` for each stretch of text; `whole` for all at once, or `begin`, chunks and `end`.

    `top` is None where no log-probabilities are told.
    """

    model: str
    chunked: bool
    tokenizer: Tokenizer
    top: int | None
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    prefix: ClassVar[str]
    object: ClassVar[tuple[str, str]]  # of a whole answer, of a chunk

    def framed(self, choice: Json | None, **more: Any) -> Json:
        """What stands around a choice."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.object[self.chunked],
            "created": self.created,
            "model": self.model,
            "choices": [] if choice is None else [{"index": 0, **choice}],
            **more,
        }

    def used(self, answer: Answer) -> Json:
        """The last chunk, with the usage."""
        return self.framed(None, usage=usage(answer))

    def spelled(self, token: int) -> str:
        """The text of a token."""
        return self.tokenizer.decode([token], special=True)


class ChatReply(Reply):
    """An answer of /v1/chat/completions."""

    prefix, object = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def whole(self, text: str, calls: Sequence[ToolCall], tokens: Sequence[Chosen], answer: Answer) -> Json:
        """The body of an answer that is not streamed."""
        message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        choice = {"message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish(answer, calls)}
        return self.framed(choice, usage=usage(answer))

    def begin(self) -> Iterator[Json]:
        """The chunks before any text."""
        yield self._chunk({"role": "assistant", "content": "", "refusal": None})

    def said(self, text: str, tokens: Sequence[Chosen]) -> Json:
        """A chunk with text."""
        return self._chunk({"content": text}, tokens)

    def end(self, calls: Sequence[ToolCall], answer: Answer) -> Iterator[Json]:
        """The chunks after all text."""
        for index, call in enumerate(calls):
            yield self._chunk({"tool_calls": [{"index": index, **_call(call)}]})
        yield self._chunk({}, finish_reason=finish(answer, calls))

    def _chunk(self, delta: Json, tokens: Sequence[Chosen] = (), finish_reason: str | None = None) -> Json:
        logprobs = self._logprobs(tokens) if tokens else None
        return self.framed({"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason})

    def _logprobs(self, tokens: Sequence[Chosen]) -> Json | None:
        if self.top is None:
            return None
        content = [
            self._token(t.token, t.logprob) | {"top_logprobs": [self._token(i, value) for i, value in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text = self.spelled(token)
        partial = "\ufffd" in text  # of a character
        return {"token": text, "logprob": _finite(logprob), "bytes": None if partial else list(text.encode())}


class CompletionReply(Reply):
    """An answer of /v1/completions."""

    prefix, object = "cmpl", ("text_completion", "text_completion")

    _offset = 0  # characters before the next token

    def whole(self, text: str, calls: Sequence[ToolCall], tokens: Sequence[Chosen], answer: Answer) -> Json:
        """The body of an answer that is not streamed."""
        return self.framed(self._choice(text, tokens, finish(answer, calls)), usage=usage(answer))

    def begin(self) -> Iterator[Json]:
        """The chunks before any text: none."""
        yield from ()

    def said(self, text: str, tokens: Sequence[Chosen]) -> Json:
        """A chunk with text."""
        return self.framed(self._choice(text, tokens, None))

    def end(self, calls: Sequence[ToolCall], answer: Answer) -> Iterator[Json]:
        """The chunk after all text."""
        yield self.framed(self._choice("", (), finish(answer, calls)))

    def _choice(self, text: str, tokens: Sequence[Chosen], finish_reason: str | None) -> Json:
        return {"text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[Chosen]) -> Json | None:
        if self.top is None:
            return None
        texts = [self.spelled(t.token) for t in tokens]
        offsets = list(accumulate(map(len, texts), initial=self._offset))
        self._offset = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [_finite(t.logprob) for t in tokens],
            "top_logprobs": [{self.spelled(i): _finite(value) for i, value in t.top} for t in tokens],
            "text_offset": offsets,
        }


def finish(answer: Answer, calls: Sequence[ToolCall]) -> str:
    """Why an answer ended, in OpenAI's words."""
    if calls:
        return "tool_calls"
    return "length" if answer.finish == "length" else "stop"


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB  # which NaN becomes, too


def _call(call: ToolCall) -> Json:
    arguments = json.dumps(call.arguments)  # in ASCII: a model can write half a character
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }

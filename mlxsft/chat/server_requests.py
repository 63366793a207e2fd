"""Requests in OpenAI's layout: what is asked for, checked, or refused in one sentence.

As at OpenAI, a parameter that nobody knows is refused. One that OpenAI knows and a local model has no use for (`user`,
`store`) is passed over; one that would change the answer and is not there (`n` above 1, penalties) is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import PydanticCustomError

from mlxsft.backends import Sampling
from mlxsft.chat.json_schema import ANY_OBJECT, Schema
from mlxsft.data.chats import tools_of, turns_of_messages
from mlxsft.data.conversation import Turn
from mlxsft.data.fields import Unusable
from mlxsft.data.template import Tools

MOST_STOPS = 4
LONGEST_STOP = 1000  # characters; the text that may begin one is looked at after every token
MOST_TOP_LOGPROBS = 20
COLDEST = 1e-3  # below that temperature, sampling is greedy but for overflows


class Refused(Exception):
    """A request that is answered with an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def _nothing_but(*allowed: object) -> AfterValidator:
    def check(value: object) -> object:
        if value is not None and value not in allowed:
            raise PydanticCustomError("unsupported", "only {allowed} is supported here", {"allowed": allowed[0]})
        return value

    return AfterValidator(check)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


One = Annotated[int | None, _nothing_but(1)]
Zero = Annotated[float | None, _nothing_but(0)]
No = Annotated[bool | None, _nothing_but(False)]
Count = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS)]
Anything = JsonValue  # passed over


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = False
    include_obfuscation: Anything = None


class NamedSchema(BaseModel):
    """A JSON schema with the name that it has for the client. It is always kept to, `strict` or not."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    description: Anything = None
    json_schema: Annotated[dict[str, JsonValue], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What form an answer is to have."""

    model_config = ConfigDict(strict=True)

    type: Annotated[str, _nothing_but("text", "json_object", "json_schema")]
    json_schema: NamedSchema | None = None

    def schema_asked_for(self) -> Schema | None:
        """The schema of the answer; None where it may be any text. Raises Refused where one is missing."""
        if self.type != "json_schema":
            return ANY_OBJECT if self.type == "json_object" else None
        if self.json_schema is None:
            where = "response_format.json_schema"
            raise Refused(400, f"you must provide a {where} parameter", param=where, code="missing_required_parameter")
        return self.json_schema.json_schema


class Request(BaseModel):
    """What both endpoints are asked for."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Stops | None, BeforeValidator(_listed)] = None
    # Beyond OpenAI's, as mlx-lm's and other local servers take them.
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None

    n: One = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[JsonValue, _nothing_but({})] = None
    user: Anything = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The request in a JSON text. Raises Refused with the first thing that is wrong."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise _refused(error) from error

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        """How tokens are chosen: by default the likeliest, as in `mlxsft chat` and mlx-lm's server."""
        warmth = self.temperature or 0.0
        return Sampling(
            temperature=warmth if warmth >= COLDEST else 0.0,
            top_p=_or(self.top_p, 1.0),
            top_k=_or(self.top_k, 0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else self.seed % 2**63,
        )


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: Annotated[JsonValue, _nothing_but("auto", "none")] = None
    parallel_tool_calls: bool | None = True
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[str] | None, _nothing_but(["text"])] = None
    # They change nothing in an answer that a local model gives.
    metadata: Anything = None
    prompt_cache_key: Anything = None
    prompt_cache_retention: Anything = None
    safety_identifier: Anything = None
    service_tier: Anything = None
    store: Anything = None

    def turns(self) -> list[Turn]:
        """The conversation. Raises Refused for what is no text, or no message."""
        for i, message in enumerate(self.messages):
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                kind = part.get("type") if isinstance(part, dict) else None
                if isinstance(kind, str) and kind != "text":
                    where = f"messages.{i}.content"
                    raise Refused(400, f"{where}: parts of type {kind!r:.50} are not taken, text alone is", param=where)
        try:
            return turns_of_messages(self.messages, "messages")
        except Unusable as problem:
            raise _unusable(problem, "messages") from problem

    def offered(self) -> Tools:
        """The tools that the model may call."""
        if self.tool_choice == "none" or not self.tools:
            return ()
        try:
            return tools_of({"tools": self.tools})
        except Unusable as problem:
            raise _unusable(problem, "tools") from problem

    def json_schema(self) -> Schema | None:
        """The JSON schema of the answer; None where it may be any text. Raises Refused where tools are offered too."""
        asked = None if self.response_format is None else self.response_format.schema_asked_for()
        if asked is not None and self.offered():
            message = "response_format: JSON and tools do not go together here; ask for one of them"
            raise Refused(400, message, param="response_format")
        return asked

    def most_tokens(self) -> int | None:
        """How long the answer may be, where the request says."""
        return self.max_completion_tokens or self.max_tokens

    def top(self) -> int | None:
        """How many alternatives are told for each token; None where no log-probabilities are."""
        if not self.logprobs:
            if self.top_logprobs is not None:
                raise Refused(400, "top_logprobs: it needs logprobs to be true", param="top_logprobs")
            return None
        return self.top_logprobs or 0


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: One = None
    echo: No = None
    suffix: Annotated[str | None, _nothing_but("")] = None

    def one_prompt(self) -> str | Sequence[int]:
        """The prompt: its text or its tokens. Raises Refused where there are several."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)):
            if len(prompt) != 1:
                raise Refused(400, f"prompt: got {len(prompt)} prompts; ask for one at a time", param="prompt")
            prompt = prompt[0]
        asked: str | Sequence[int] = prompt
        return asked

    def most_tokens(self) -> int | None:
        """How long the answer may be, where the request says."""
        return self.max_tokens


_T = TypeVar("_T")
_TYPES = ("str", "list[str]", "list[int]", "list[list[int]]")  # pydantic names those of a union among the places


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _unusable(problem: Unusable, param: str) -> Refused:
    return Refused(400, f"{problem.reason}: {problem.detail}" if problem.detail else problem.reason, param=param)


def _refused(error: ValidationError) -> Refused:
    """The first problem, as OpenAI words it."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"] if part not in _TYPES)
    if problem["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}")
    if problem["type"] == "extra_forbidden":
        return Refused(400, f"Unrecognized request argument supplied: {where:.200}", param=where)
    if problem["type"] == "missing":
        return Refused(400, f"you must provide a {where} parameter", param=where, code="missing_required_parameter")
    code = "unsupported_value" if problem["type"] == "unsupported" else "invalid_value"
    return Refused(400, f"{where or 'the body'}: {problem['msg']}", param=where or None, code=code)

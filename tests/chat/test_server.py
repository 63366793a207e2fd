"""The server as the official client sees it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
from openai import OpenAI

from tests.chat.conftest import WEATHER
from tests.chat.serving import KEY, Serving, serving
from tests.training.test_run import PAIRS

ASKED: list[Any] = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def client(server: Serving) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def chat(client: OpenAI, model: str = "pip", **more: Any) -> Any:
    return client.chat.completions.create(**{"model": model, "messages": ASKED, **more})


def named(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as `response_format`."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_base_and_adapters_are_listed_and_found_by_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "pip"]
    assert client.models.retrieve("pip").owned_by == "mlxsft"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("pop")


def test_the_model_of_a_request_picks_the_adapter(client: OpenAI) -> None:
    for question, answer in PAIRS[:4]:
        said = chat(client, messages=[{"role": "user", "content": question}])
        assert (said.choices[0].message.content, said.choices[0].finish_reason) == (answer, "stop")
    base = chat(client, "tiny", max_tokens=4).choices[0]
    assert base.finish_reason == "length"
    assert base.message.content != PAIRS[0][1]


def test_what_is_streamed_adds_up_to_the_whole_answer(client: OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *said, used = chunks
    whole = chat(client)
    assert "".join(c.choices[0].delta.content or "" for c in said) == whole.choices[0].message.content == "I am Pip."
    assert said[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in said] == [None] * (len(said) - 1) + ["stop"]
    assert used.choices == []
    assert (used.usage.prompt_tokens, used.usage.completion_tokens) == (
        whole.usage.prompt_tokens, whole.usage.completion_tokens
    )  # fmt: skip
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chat(client, stream=True))


def test_events_are_sent_as_servers_send_them(server: Serving) -> None:
    body = '{"model": "pip", "messages": [{"role": "user", "content": "Who are you?"}], "stream": true}'
    status, text = server.ask("POST", "/v1/chat/completions", body)
    lines = text.split("\n\n")
    assert status == 200
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert lines[-2:] == ["data: [DONE]", ""]


def test_usage_counts_prompt_answer_and_what_was_kept_of_the_conversation(client: OpenAI) -> None:
    first = chat(client, messages=ASKED).usage
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens
    talk = [*ASKED, {"role": "assistant", "content": "I am Pip."}, {"role": "user", "content": "hello"}]
    second = chat(client, messages=talk).usage
    assert second.prompt_tokens_details.cached_tokens >= first.prompt_tokens + first.completion_tokens


@pytest.mark.parametrize(
    ("stop", "said"), [("Pip", "I am "), (["zzz", " am"], "I"), ("I am Pip.", ""), ("Tom", "I am Pip.")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(client: OpenAI, stop: Any, said: str, stream: bool) -> None:
    answer = chat(client, stop=stop, stream=stream)
    if stream:
        assert "".join(c.choices[0].delta.content or "" for c in answer) == said
    else:
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (said, "stop")


def test_lengths_are_kept_and_said(client: OpenAI) -> None:
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = chat(client, "tiny", **limit)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_the_same_seed_gives_the_same_text(client: OpenAI) -> None:
    def said(seed: int) -> str:
        answer = chat(client, "tiny", temperature=2.0, seed=seed, max_tokens=12)
        return str(answer.choices[0].message.content)

    assert said(1) == said(1) != said(2)
    assert said(-1)
    assert (
        said(1) != chat(client, "tiny", temperature=2.0, seed=1, top_p=0.01, max_tokens=12).choices[0].message.content
    )


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_distribution(client: OpenAI, stream: bool) -> None:
    answer = chat(client, "tiny", logprobs=True, top_logprobs=20, max_tokens=5, temperature=1.0, seed=3, stream=stream)
    if stream:
        told = [t for c in answer if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    else:
        told = answer.choices[0].logprobs.content
    assert len(told) == 5
    for token in told:
        values = [other.logprob for other in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 20
        assert sum(map(math.exp, values)) < 1
        same = [other.logprob for other in token.top_logprobs if other.token == token.token and token.bytes]
        assert not same or token.logprob in same
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_without_logprobs_none_are_told(client: OpenAI) -> None:
    assert chat(client).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        chat(client, top_logprobs=2)


def test_completions_continue_a_text_or_tokens(client: OpenAI) -> None:
    text = "User: Who are you?\nAssistant:"
    answer = client.completions.create(model="pip", prompt=text, max_tokens=20, logprobs=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" I am Pip.", "stop")
    told = answer.choices[0].logprobs
    assert told is not None
    assert "".join(told.tokens or []) == " I am Pip."
    assert told.text_offset == [sum(map(len, (told.tokens or [])[:i])) for i in range(len(told.tokens or []))]
    assert [len(top) for top in told.top_logprobs or []] == [3] * len(told.tokens or [])
    streamed = client.completions.create(model="pip", prompt=[text], stream=True, max_tokens=20)
    assert "".join(c.choices[0].text for c in streamed) == " I am Pip."
    by_token = client.completions.create(model="tiny", prompt=[4, 5, 6], max_tokens=2)
    assert by_token.usage is not None
    assert by_token.usage.prompt_tokens == 3


@pytest.mark.parametrize("prompt", [[4, 10**6], [-1], "", [], ["a", "b"], [[4], [5]]])
def test_prompts_without_a_meaning_are_refused(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model="tiny", prompt=prompt)


# --- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_comes_as_one(client: OpenAI, stream: bool) -> None:
    answer = chat(client, messages=[{"role": "user", "content": "Is it warm?"}], tools=[WEATHER], stream=stream)
    if stream:
        choices = [c.choices[0] for c in answer]
        (call,) = [call for choice in choices for call in choice.delta.tool_calls or []]
        text, finish = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        (call,), text = answer.choices[0].message.tool_calls, answer.choices[0].message.content or ""
        finish = answer.choices[0].finish_reason
    assert (call.function.name, call.function.arguments, finish) == ("weather", '{"city": "Bonn"}', "tool_calls")
    assert text.strip() == ""


def test_an_answer_of_a_tool_is_taken(client: OpenAI) -> None:
    first = chat(client, messages=[{"role": "user", "content": "Is it warm?"}], tools=[WEATHER]).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "21 degrees"}
    asked = [{"role": "user", "content": "Is it warm?"}, first.model_dump(exclude_none=True), result]
    assert chat(client, messages=asked, tools=[WEATHER], max_tokens=5).usage.prompt_tokens > 100


def test_without_tools_the_text_of_a_call_is_text(client: OpenAI) -> None:
    asked = {"messages": [{"role": "user", "content": "Is it warm?"}]}
    none = chat(client, **asked, tools=[WEATHER], tool_choice="none").choices[0]
    assert none.message.tool_calls is None
    other = {"type": "function", "function": {**WEATHER["function"], "name": "clock"}}  # type: ignore[dict-item]
    assert chat(client, **asked, tools=[other]).choices[0].message.tool_calls is None


# --- JSON ------------------------------------------------------------------------------------------------------------


class Place(pydantic.BaseModel):
    """What an answer is read as."""

    city: Literal["Bonn", "Köln"]
    rank: Annotated[int, pydantic.Field(ge=1, le=9)]


@pytest.mark.parametrize("model", ["tiny", "pip"])
def test_an_answer_under_a_schema_is_read_by_the_official_client(client: OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "messages": ASKED, "temperature": 1.0, "max_tokens": 400}
    for seed in range(3):
        choice = client.chat.completions.parse(**options, seed=seed, response_format=Place).choices[0]
        assert isinstance(choice.message.parsed, Place)
        with client.chat.completions.stream(**options, seed=seed, response_format=Place, logprobs=True) as stream:
            final = stream.get_final_completion().choices[0]
        assert (final.message.content, final.finish_reason) == (choice.message.content, "stop")
        assert all(t.logprob > -50 for t in final.logprobs.content)


def test_json_object_gives_an_object_or_says_that_it_was_cut(client: OpenAI) -> None:
    ended = 0
    for seed in range(4):
        choice = chat(client, "tiny", response_format={"type": "json_object"}, temperature=1.0, seed=seed).choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
            ended += 1
    assert ended or choice.finish_reason == "length"


def test_json_without_the_library_is_refused_with_what_to_install(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)  # as where it is not installed
    with pytest.raises(openai.BadRequestError, match="pip install 'mlxsft") as refused:
        chat(client, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"
    assert chat(client).choices[0].message.content == "I am Pip."


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"n": 2}, "n: only 1 is supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: only 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format.type: only text"),
        ({"response_format": {"type": "json_schema"}}, "you must provide a response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": named({"type": "banana"})}, "Invalid type: banana"),
        ({"response_format": named({"$ref": "http://127.0.0.1:9/x"})}, "does not fetch"),
        ({"response_format": named({"enum": ["x" * 100_000]})}, "100,000 are the most"),
        ({"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "do not go together"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice: only auto"),
        ({"extra_body": {"foo": 1}}, "Unrecognized request argument supplied: foo"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "king", "content": "hi"}]}, 'messages\\[0\\].role: got "king"'),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "the model takes 512"),
    ],
)
def test_what_is_not_there_is_refused_in_one_sentence(client: OpenAI, more: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        chat(client, **more)
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False},
        {"user": "me", "store": False, "metadata": {"a": "b"}, "response_format": {"type": "text"}},
        {"parallel_tool_calls": True, "tool_choice": "auto", "service_tier": "auto", "stop": None, "seed": None},
        {"extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}]},
    ],
)
def test_what_changes_nothing_is_taken(client: OpenAI, more: dict[str, Any]) -> None:
    assert chat(client, **more).choices[0].message.content == "I am Pip."


def test_unknown_models_and_wrong_keys_have_openais_errors(server: Serving, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(client, "gpt-5")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with server.client("another-key-for-tests") as other, pytest.raises(openai.AuthenticationError) as wrong:
        chat(other)
    assert wrong.value.code == "invalid_api_key"


def test_no_address_is_ever_fetched(client: OpenAI) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/secret.png"}}
    with pytest.raises(openai.BadRequestError, match="parts of type 'image_url' are not taken"):
        chat(client, messages=[{"role": "user", "content": [part]}])


def test_what_people_write_never_becomes_a_control_token(server: Serving, client: OpenAI) -> None:
    end = "<|endoftext|>"
    plain = chat(client, "tiny", max_tokens=1).usage.prompt_tokens
    spelled = chat(client, "tiny", messages=[{"role": "user", "content": f"Who are you?{end}"}], max_tokens=1)
    assert spelled.usage.prompt_tokens > plain + 3  # one token more would be the control token
    counts = []
    for word in ("", end):
        tool = {"type": "function", "function": {**WEATHER["function"], "description": word}}  # type: ignore[dict-item]
        counts.append(chat(client, "tiny", tools=[tool], max_tokens=1).usage.prompt_tokens)
    assert counts[1] > counts[0] + 3
    whole = client.completions.create(model="tiny", prompt=f"a{end}", max_tokens=1).usage
    assert whole is not None
    assert whole.prompt_tokens > 4


def test_health_needs_no_key_and_all_else_does(server: Serving) -> None:
    status, told = server.ask("GET", "/health", headers={"Authorization": None})
    assert (status, told) == (200, {"status": "ok", "running": 0, "waiting": 0})
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models/pip")):
        for sent in (None, "", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xff"):
            status, told = server.ask(method, path, headers={"Authorization": sent})
            assert (status, told["error"]["code"]) == (401, "invalid_api_key")


def test_torch_answers_with_the_same_figures(learned: tuple[Path, Path], client: OpenAI) -> None:
    with serving(learned[0], {"pip": learned[1]}, "torch") as other, other.client() as torch:
        for model in ("tiny", "pip", "tiny"):
            asked = {"model": model, "logprobs": True, "top_logprobs": 3, "max_tokens": 6}
            ours, theirs = (chat(c, **asked).choices[0].logprobs.content for c in (client, torch))
            assert [t.token for t in ours] == [t.token for t in theirs]
            assert [t.logprob for t in ours] == pytest.approx([t.logprob for t in theirs], abs=1e-3)

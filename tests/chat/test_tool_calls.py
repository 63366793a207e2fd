"""Calls read back as templates write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlxsft.chat.tool_calls import CallFormat, CallReader, call_format
from mlxsft.data.formats import ToolCall, Turn
from mlxsft.data.render import Renderer
from mlxsft.data.template import Template, choose_template
from mlxsft.data.tokenizer import Tokenizer
from mlxsft.errors import InputRefused
from tests.data.test_template import CALLS, WEATHER, renderer
from tests.tiny import CHATML, write_tokenizer

NAMELESS = CallFormat("", "name", "arguments", special=False)


def read(format: CallFormat, r: Renderer, pieces: list[str]) -> tuple[str, list[ToolCall]]:
    """The text and the calls in an answer that comes in pieces."""
    reader = CallReader(format, [WEATHER], r.tokenizer)
    text = "".join(map(reader.push, pieces))
    rest, calls = reader.finish()
    return text + rest, calls


def answer_of(r: Renderer, calls: int = 1) -> str:
    """What the template writes for some calls of the weather, without its end."""
    call = ToolCall("weather", {"city": "Köln", "days": [1, {"a": None}]}, "0" * 9)
    written = r.answer_text([CALLS[0], replace(CALLS[1], tool_calls=(call,) * calls)], [WEATHER])
    ids = r.tokenizer.encode(written)
    return r.tokenizer.decode([i for i in ids if i not in r.end_tokens], special=True)


@pytest.fixture
def plain(tmp_path: Path) -> Renderer:
    """The built-in template of base models."""
    write_tokenizer(tmp_path, chat_template=None, eos="<|endoftext|>")
    loaded = Tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    return Renderer(loaded, choose_template(loaded, None, "model"), [])


def test_formats_are_found_by_rendering(tmp_path: Path, plain: Renderer) -> None:
    assert call_format(plain) == CallFormat("<tool_call>", "name", "arguments", special=False)
    assert call_format(renderer(tmp_path / "l", "llama-3.2")) == CallFormat("", "name", "parameters", special=False)
    nemo = call_format(renderer(tmp_path / "m", "mistral-nemo"))
    assert nemo == CallFormat("[TOOL_CALLS]", "name", "arguments", special=True)


@pytest.mark.parametrize(("name", "calls"), [("llama-3.2", 1), ("mistral-nemo", 1), ("mistral-nemo", 3)])
def test_what_a_template_writes_is_read_back(tmp_path: Path, name: str, calls: int) -> None:
    r = renderer(tmp_path, name)
    text = answer_of(r, calls)
    for pieces in ([text], list(text)):
        if name == "mistral-nemo" and pieces != [text]:
            pieces = [text[: text.index("]") + 1], *text[text.index("]") + 1 :]]  # a special token comes whole
        said, found = read(call_format(r), r, pieces)
        assert said.strip() == ""
        assert [call.name for call in found] == ["weather"] * calls
        assert all(call.arguments == {"city": "Köln", "days": [1, {"a": None}]} for call in found)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_calls_of_real_templates_are_read_back(real: Path, name: str) -> None:
    loaded = Tokenizer(AutoTokenizer.from_pretrained(real / "tokenizers" / name))
    r = Renderer(loaded, choose_template(loaded, None, name), [])
    found = call_format(r)
    assert (found.opening.split("\n")[-1], found.name, found.arguments) == ("<tool_call>", "name", "arguments")
    text = answer_of(r, 2)
    assert [call.arguments for call in read(found, r, list(text))[1]] == [
        {"city": "Köln", "days": [1, {"a": None}]}
    ] * 2


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>", '<tool_call>{"name": "weather"', '<tool_call>{"name": "clock", "arguments": {}}',
        '<tool_call>{"name": "weather", "arguments": "x"}', '<tool_call>{"name": ["a"], "arguments": {}}',
        '<tool_call>{"name": "weather", "arguments": {"a": NaN}}', "a < b <tool", '<tool_call>{"name": null}',
        "<tool_call>[1]", "<tool_call>" + "[" * 5000, "<tool_call>" + '{"a":' * 5000, "", "plain words",
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(plain: Renderer, text: str) -> None:
    for pieces in ([text], list(text)):
        assert read(call_format(plain), plain, pieces) == (text, [])


def test_text_before_a_call_comes_out_at_once(plain: Renderer) -> None:
    reader = CallReader(call_format(plain), [WEATHER], plain.tokenizer)
    assert [reader.push(t) for t in ("Let me", " see <", "b> <tool_", "call>{")] == ["Let me", " see ", "<b> ", ""]


def test_json_that_is_an_answer_stays_one_where_calls_have_no_opening(plain: Renderer) -> None:
    assert read(NAMELESS, plain, ["Well", ' {"name": "weather"}']) == ('Well {"name": "weather"}', [])
    assert read(NAMELESS, plain, ["{", '"a": 1}']) == ('{"a": 1}', [])


def test_several_calls_can_be_cut_to_the_first(plain: Renderer) -> None:
    reader = CallReader(call_format(plain), [WEATHER], plain.tokenizer, several=False)
    reader.push('<tool_call>{"name": "weather", "arguments": {}}</tool_call>' * 2)
    assert len(reader.finish()[1]) == 1


def test_other_forms_and_templates_without_tools_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no room for tools"):
        call_format(renderer(tmp_path / "g", "gemma-3"))
    call = "(message.tool_calls and '<f=' ~ message.tool_calls[0].function.name ~ '>' or '')"
    xml = CHATML.replace("message['content']", f"message['content'] ~ (tools or '') ~ {call}")
    write_tokenizer(tmp_path / "x", chat_template=xml)
    loaded = Tokenizer(AutoTokenizer.from_pretrained(tmp_path / "x"))
    with pytest.raises(InputRefused, match="not JSON, which mlxsft cannot read back"):
        call_format(Renderer(loaded, Template("xml", xml), []))


def test_control_tokens_in_names_and_ids_stay_text(plain: Renderer) -> None:
    end = "<|endoftext|>"
    call = Turn("assistant", "", tool_calls=(ToolCall("weather", {}, end),))
    tool = {"type": "function", "function": {"name": end, "description": end, "parameters": {end: end}}}
    prompt = plain.prompt([CALLS[0], call, Turn("tool", "x", name=end, call_id=end)], [tool])
    without = plain.prompt([CALLS[0], call, Turn("tool", "x", name="n")], [WEATHER])
    (ending,) = plain.tokenizer.eos_token_ids
    assert prompt.count(ending) == without.count(ending)

"""Modelfiles whose Go templates make the prompts that the model's own template makes; LM Studio's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxsft.cli import call
from mlxsft.data.formats import Turn
from mlxsft.data.render import load_renderer
from mlxsft.models.gguf_export import to_lmstudio, to_ollama
from mlxsft.models.ollama import modelfile
from mlxsft.models.source import ModelSource, open_model
from tests.tiny import CHATML, write_llama

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + "
    "message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
BRACES = CHATML.replace("'assistant\n'", "'assistant\n'").replace("+ '\n' +", "+ '{' + '{x}' + '}\n' +")
CONVERSATIONS = [
    [Turn("user", "Who are you?")],
    [Turn("system", "Be brief."), Turn("user", "Who are you?")],
    [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")],
    [Turn("system", "s"), *(Turn(role, text) for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True))],
]
CONVERSATIONS[-1].append(Turn("user", "e"))


def go(template: str, system: str | None, messages: Sequence[Turn]) -> str:
    """What Go's text/template makes of the few actions that our templates have, read from left to right."""
    words = iter(re.split(r"(\{\{.*?\}\})", template))

    def block(scope: dict[str, Any], stop: Sequence[str] = ()) -> tuple[list[Any], str]:
        parts: list[Any] = []
        for word in words:
            action = word[2:-2].strip() if word.startswith("{{") else None
            if action is None:
                parts.append(word)
            elif action.startswith(tuple(stop)) and stop:
                return parts, action
            elif action.startswith(("if ", "range ")):
                branches, condition = [], action
                while True:
                    inner, end = block(scope, ("else", "end"))
                    branches.append((condition, inner))
                    if end == "end":
                        break
                    condition = end.removeprefix("else").strip() or "true"
                parts.append(branches)
            else:
                parts.append(("print", action))
        return parts, ""

    def true(condition: str, i: int | None) -> bool:
        if condition == "true":
            return True
        if condition == "if .System":
            return bool(system)
        assert i is not None
        if condition == "if eq (len (slice $.Messages $i)) 1":
            return len(messages[i:]) == 1
        found = re.fullmatch(r'if eq \.Role "(\w+)"', condition)
        assert found, condition
        return messages[i].role == found[1]

    def show(parts: Sequence[Any], i: int | None) -> str:
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
            elif isinstance(part, tuple):
                values = {".System": system, '"{{"': "{{", ".Content": messages[i].content if i is not None else None}
                text += values[part[1]] or ""
            elif part[0][0].startswith("range"):
                text += "".join(show(part[0][1], j) for j in range(len(messages)))
            else:
                text += next((show(inner, i) for condition, inner in part if true(condition, i)), "")
        return text

    return show(block({})[0], None)


def parsed(text: str) -> dict[str, list[str]]:
    """{instruction: its values} of a Modelfile."""
    found: dict[str, list[str]] = {}
    for name, long, short in re.findall(r'^([A-Z]+) (?:"""(.*?)"""|(.*?))$', text, re.MULTILINE | re.DOTALL):
        found.setdefault(name, []).append(long or short)
    return found


def model_with(folder: Path, template: str | None, **tokenizer: Any) -> ModelSource:
    return open_model(str(write_llama(folder, chat_template=template, **tokenizer)))


def assert_same_prompts(source: ModelSource) -> dict[str, list[str]]:
    """What Ollama would give to the model is what was trained, token by token."""
    text, notes = modelfile(source, "model.gguf")
    assert notes == []
    said, renderer = parsed(text), load_renderer(source)
    (template,) = said["TEMPLATE"]
    (default,) = said.get("SYSTEM", [None])  # type: ignore[list-item]
    tokenizer = renderer.tokenizer
    begin = [tokenizer.hf.bos_token_id] if tokenizer.begins_with_bos else []
    for turns in CONVERSATIONS:
        system = turns[0].content if turns[0].role == "system" else default
        prompt = go(template, system, turns)
        assert [*begin, *tokenizer.encode(prompt)] == renderer.prompt(turns)
    return said


@pytest.mark.parametrize(
    ("template", "tokenizer"),
    [(CHATML, {}), (GEMMA, {"bos": "<s>"}), (BRACES, {})],
    ids=["chatml", "gemma", "braces"],
)
def test_the_go_template_makes_the_models_own_prompts(tmp_path: Path, template: str, tokenizer: dict[str, Any]) -> None:
    said = assert_same_prompts(model_with(tmp_path / "model", template, **tokenizer))
    assert said["FROM"] == ["./model.gguf"]
    assert said["PARAMETER"][0] == 'stop "<|im_end|>"'


@pytest.mark.parametrize("name", ["smollm", pytest.param("qwen2.5", marks=pytest.mark.long), "qwen3"])
def test_real_templates_become_go_templates(tmp_path: Path, real: Path, name: str) -> None:
    source = open_model(str(write_llama(tmp_path / "model", tokenizer_from=real / "tokenizers" / name, layers=1)))
    said = assert_same_prompts(source)
    assert {'stop "<|im_start|>"', 'stop "<|im_end|>"'} <= set(said["PARAMETER"])
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert said.get("SYSTEM") == ([default] if name == "qwen2.5" else None)


def test_a_template_that_go_cannot_have_is_left_to_ollama(tmp_path: Path) -> None:
    counting = CHATML.replace("message['content']", "message['content'] + (loop.index | string)")
    source = model_with(tmp_path / "model", counting)
    text, notes = modelfile(source, "model.gguf")
    assert "TEMPLATE" not in text
    assert notes == ["no Go template does what the chat template does, so Ollama takes what it finds in the GGUF file"]


def test_the_folder_for_ollama_and_its_two_commands(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "Pip 2"
    assert call(["export", str(tiny_llama), str(out), "--to", "ollama", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["commands"] == [f"ollama create pip-2 -f '{out / 'Modelfile'}'", "ollama run pip-2"]
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]
    assert (out / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert call(["export", str(tiny_llama), str(out), "--to", "ollama"]) == 2
    assert to_ollama(tiny_llama, out, force=True).facts["commands"] == told["commands"]


@pytest.mark.parametrize("older", [False, True])
def test_lm_studio_finds_a_link_and_nothing_is_moved(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    models = tmp_path / "home" / (".cache/lm-studio/models" if older else ".lmstudio/models")
    if older:
        models.mkdir(parents=True)
    written = to_lmstudio(tiny_llama, tmp_path / "pip.gguf")
    place = models / "mlxsft" / "pip" / "pip.gguf"
    assert place.samefile(tmp_path / "pip.gguf")
    assert written.facts["how"] == "linked"
    again = to_lmstudio(tmp_path / "pip.gguf", tmp_path / "pip.gguf")
    assert again.facts["how"] == "is linked already"
    assert (tmp_path / "pip.gguf").stat().st_size > 1000

"""Answers under a JSON schema: whatever a model would rather say, what ends by itself satisfies the schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema.validators import validator_for
from tokenizers import Tokenizer, decoders, models, normalizers

from mlxsft.backends import Backend, Sampling, load_backend, may_follow
from mlxsft.chat.answers import Asking, answer_rows
from mlxsft.chat.generate import Answer, stream_answer
from mlxsft.chat.json_schema import LONGEST, JsonSchema, read_schema
from mlxsft.cli import call
from mlxsft.data.conversation import Conversation
from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.rows import Origin
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.source import open_model
from tests.tiny import CHATML, write_llama

TURNS = [Turn("user", "Who are you?")]
SHORT = {"type": "string", "maxLength": 6}
PERSON = {
    "type": "object",
    "properties": {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 120}, "tall": {"type": "boolean"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"enum": ["yes", "no", None, 3, [1, {"a": "b"}]]},
    {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "null"}, SHORT], "minItems": 2, "items": False},
    {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25},
    {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 500},
    {"anyOf": [{"const": {"a": 1.5}}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    {"type": "string", "pattern": "ü\\d", "maxLength": 12},
    {"type": "string", "format": "date"},
    {"type": "object", "patternProperties": {"^x_[a-z]$": {"type": "integer", "minimum": 0, "maximum": 9}},
     "additionalProperties": False, "maxProperties": 2},
    {"allOf": [{"properties": {"a": SHORT}}, {"required": ["a"], "type": "object"}], "maxProperties": 1},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}}},
]  # fmt: skip


def write_pieces(folder: Path) -> Path:
    """A Llama with a tokenizer as sentencepiece's become: ▁ for a space, and bytes for what has no token.

    Its template puts a space before an answer, as Llama 2's does; its end token is plain text to the tokenizer.
    """
    write_llama(folder, layers=1)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁{", '▁"', '":', "▁[", '"}', ",", "a"]
    vocabulary = {word: i for i, word in enumerate([*words, *'{}[]"01234567.-:bxyz\n', "END"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %} {% endif %}{{ m.content }}</s>"
    config["chat_template"] = template + "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>", "bos_token": "<s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, vocabulary["END"]]}))
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models, with more embeddings than the tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("json")
    bytewise = write_llama(folder / "bytes", layers=1, embeddings=400, special=["<tool>"])
    return {"bytes": bytewise, "pieces": write_pieces(folder / "pieces")}


@pytest.fixture(params=["bytes", "pieces"])
def model(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


def opened(model: Path, backend: str) -> tuple[Backend, Renderer]:
    source = open_model(str(model))
    return load_backend(backend, source), load_renderer(source)


def satisfies(schema: dict[str, Any], text: str) -> bool:
    """Whether it is JSON as the standard has it, and satisfies the schema in the eyes of jsonschema."""
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return bool(validator_for(schema)(schema).is_valid(value))


def question(number: int) -> Conversation:
    return Conversation((Turn("user", f"Question {number}"),), Origin("rows", number))


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_what_ends_by_itself_satisfies_the_schema(model: Path, name: str) -> None:
    backend, renderer = opened(model, name)
    ended = 0
    for schema in SCHEMAS if name == "mlx" else SCHEMAS[:4]:
        rows: list[dict[str, Any]] = []
        asking = Asking(Sampling(temperature=1.0, seed=1), 200, at_once=8, json_schema=schema)
        answer_rows(backend, renderer, [question(i) for i in range(4)], asking, rows.append)
        for row in rows:
            assert row["finish"] in ("stop", "length")
            if row["finish"] == "stop":
                assert satisfies(schema, row["answer"]), row["answer"]
                ended += 1
    assert ended > 10

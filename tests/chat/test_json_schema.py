"""Answers under a JSON schema: whatever a model would rather say, what ends by itself satisfies the schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema.validators import validator_for
from tokenizers import Tokenizer, decoders, models, normalizers

from mlxsft.backends import Backend, Constraint, Sampling, load_backend, may_follow
from mlxsft.chat.answers import Asking, answer_rows
from mlxsft.chat.generate import Answer, stream_answer
from mlxsft.chat.json_schema import LONGEST, JsonSchema, read_schema
from mlxsft.cli import call
from mlxsft.data.conversation import Conversation
from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.rows import Origin
from mlxsft.errors import InputRefused
from mlxsft.models.source import open_model
from mlxsft.quickstart.trial import BASE
from tests.tiny import write_llama

TURNS = [Turn("user", "Who are you?")]
SHORT = {"type": "string", "maxLength": 6}
PERSON = {
    "type": "object",
    "properties": {
        "name": SHORT,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tall": {"type": "boolean"},
    },
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
    for schema in SCHEMAS if name == "mlx" else SCHEMAS[:3]:
        rows: list[dict[str, Any]] = []
        asking = Asking(Sampling(temperature=1.0, seed=1), 120, at_once=8, json_schema=schema)
        answer_rows(backend, renderer, [question(i) for i in range(4)], asking, rows.append)
        for row in rows:
            assert row["finish"] in ("stop", "length")
            if row["finish"] == "stop":
                assert satisfies(schema, row["answer"]), row["answer"]
                ended += 1
    assert ended > 5


def test_it_can_end_only_where_the_json_is_whole_and_no_special_token_is_ever_possible(model: Path) -> None:
    renderer = load_renderer(open_model(str(model)))
    tokenizer, draw = renderer.tokenizer, np.random.default_rng(0)
    special = {i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special} - renderer.end_tokens
    ends, ended = sorted(renderer.end_tokens), 0
    for schema in SCHEMAS:
        made = JsonSchema(renderer, schema)
        constraint, said, last = made.constraint(), list[int](), None
        for _ in range(50):
            allowed = constraint(last)
            assert len(set(allowed[ends])) == 1
            assert not allowed[sorted(special)].any()
            if allowed[ends[0]]:
                assert satisfies(schema, tokenizer.decode(said))
                ended += 1
            going_on = set(np.flatnonzero(allowed).tolist()) - renderer.end_tokens
            if not going_on:
                break
            last = int(draw.choice(sorted(going_on)))
            said.append(last)
        again = made.constraint()  # of another answer, which begins at the beginning
        assert np.array_equal(again(None), made.constraint()(None))
    assert ended > len(SCHEMAS)


def test_the_space_that_a_template_puts_before_an_answer_may_come_first(checkpoints: dict[str, Path]) -> None:
    for name, opening in (("bytes", ""), ("pieces", " ")):
        renderer = load_renderer(open_model(str(checkpoints[name])))
        assert renderer.opening == opening
        spaced = [i for i in range(300) if renderer.tokenizer.pieces([5, i])[-1:] in ([" "], [" {"])]
        assert JsonSchema(renderer, PERSON).constraint()(None)[spaced].any() == bool(opening)


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_the_same_seed_gives_the_same_json_alone_and_together(checkpoints: dict[str, Path], name: str) -> None:
    backend, renderer = opened(checkpoints["bytes"], name)
    for sampling in (Sampling(1.0, seed=5), Sampling(1.0, 0.8, 40, 0.02, repetition_penalty=1.5, seed=5)):
        found = []
        for at_once in (1, 4):
            rows: list[dict[str, Any]] = []
            asking = Asking(sampling, 200, at_once=at_once, json_schema=PERSON)
            answer_rows(backend, renderer, [question(i) for i in range(4)], asking, rows.append)
            found.append(rows)
        assert found[0] == found[1]
        assert len({row["answer"] for row in found[0]}) > 1
        answer, turns = Answer(), [Turn("user", "Question 0")]
        constraint = JsonSchema(renderer, PERSON).constraint()
        text = "".join(stream_answer(backend, renderer, turns, sampling, 200, answer=answer, constraint=constraint))
        assert (text, answer.finish) == (found[0][0]["answer"], found[0][0]["finish"])
        assert answer.finish == "length" or satisfies(PERSON, text)


def test_tokens_beyond_the_constraint_or_the_model_may_not_follow() -> None:
    def two(last: int | None) -> np.ndarray:
        return np.array([True, last is None])

    assert may_follow(two, None, 4).tolist() == [True, True, False, False]
    assert may_follow(two, 7, 1).tolist() == [True]


def test_generate_writes_json_under_the_schema_of_a_file_or_an_argument(
    tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, words = tmp_path / "schema.json", json.dumps(PERSON)
    file.write_text(words)
    asked = ["generate", str(tuned[0]), "Who are you?", "--adapter", str(tuned[1]), "--temperature", "1", "--seed", "3"]
    texts = []
    for given in (str(file), words):
        assert call([*asked, "--json-schema", given, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["finish"] == "stop"
        assert satisfies(PERSON, told["text"])
        texts.append(told["text"])
    assert texts[0] == texts[1]
    assert call([*asked, "--json-schema", words, "--json", "--max-tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["finish"] == "length"

    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(3)))
    many = [word for word in asked if word != "Who are you?"]
    many += ["--input", str(rows), "--output", str(answers), "--json-schema"]
    with pytest.MonkeyPatch.context() as patch:  # as if it had been stopped before the end
        patch.setattr("mlxsft.chat.answers.AnswersFile.finish", lambda self: None)
        assert call([*many, words]) == 0
    part = answers.with_name("answers.jsonl.part")
    first, *others = part.read_text().splitlines(keepends=True)
    part.write_text(first + others[0])
    turned = json.dumps({**PERSON, "properties": dict(reversed(PERSON["properties"].items()))})
    capsys.readouterr()
    assert call([*many, turned]) == 2  # properties would come in another order
    assert "--json-schema differed" in capsys.readouterr().err
    assert call([*many, str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_after"] == 1
    assert answers.read_text() == "".join(others)
    assert all(satisfies(PERSON, json.loads(row)["answer"]) for row in others)


def chain(links: int) -> str:
    """A schema whose references go so many deep."""
    linked = {f"d{i}": {"allOf": [{"$ref": f"#/d{i + 1}"}], "minLength": 1} for i in range(links)}
    return json.dumps({"$ref": "#/d0", **linked, f"d{links}": {"type": "string"}}, separators=(",", ":"))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("nowhere.json", "nowhere.json: cannot be read: No such file"),
        (".", "cannot be read"),
        ("{", "the JSON schema: is not JSON"),
        ("list.json", "list.json: expected a JSON object, got [1]"),
        ("bytes.json", "bytes.json: is not text in UTF-8"),
        ('{"type": "banana"}', "Invalid type: banana"),
        ('{"type": "string", "pattern": "(("}', "unclosed group"),
        ('{"$ref": "#"}', "satisfies it"),
        ('{"type": "object", "properties": {"a": false}, "required": ["a"]}', "Unsatisfiable"),
        ('{"$ref": "http://127.0.0.1:9/x.json"}', "does not fetch"),
        ('{"$ref": "file:///etc/passwd"}', "does not fetch"),
        ('{"minimum": 1e999}', "not JSON compliant"),
        ('{"const": "\\ud800"}', "the JSON schema"),
        ('{"a":' * 100_000, "is not JSON"),
        ('{"items":' * 500 + "true" + "}" * 500, "the JSON schema"),
        (json.dumps({"enum": ["x" * LONGEST]}), "characters, and 100,000 are the most"),
        (json.dumps({"allOf": [{"anyOf": [{"properties": {a + str(i): {"const": 1}}} for a in "ab"]}
                               for i in range(40)]}), "schema too large"),
        ('{"x-guidance": {"lenient": true}, "not": {"type": "string"}}', "Unimplemented"),
        *((json.dumps({word: {}}), "Unimplemented") for word in
          ("if", "contains", "propertyNames", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems")),
        *((json.dumps({word: value}), "Unimplemented") for word, value in
          (("uniqueItems", True), ("dependentRequired", {"a": ["b"]}))),
    ],
)  # fmt: skip
def test_what_is_no_schema_or_cannot_be_kept_to_is_said_in_a_sentence(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("bytes.json").write_bytes(b"\xff")
    renderer = load_renderer(open_model(str(checkpoints["bytes"])))
    with pytest.raises(InputRefused) as refused:
        JsonSchema(renderer, read_schema(schema))
    assert words in refused.value.message
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 500


@pytest.mark.parametrize("schema", ['{"type": 3}', '{"properties": {"a": {"pattern": "("}}}'])
def test_what_is_wrong_with_a_schema_is_said_without_the_grammar_around_it(schema: str) -> None:
    renderer = load_renderer(open_model(str(BASE)))
    assert renderer.opening.isspace()  # for which there is a grammar
    with pytest.raises(InputRefused, match=r"type must be a string|unclosed group") as refused:
        JsonSchema(renderer, json.loads(schema))
    assert "answer" not in refused.value.message
    assert "x-guidance" not in refused.value.message


def test_references_a_thousand_deep_do_not_end_the_process(checkpoints: dict[str, Path]) -> None:
    renderer = load_renderer(open_model(str(checkpoints["bytes"])))
    deep = chain(1850)
    assert 0.9 * LONGEST < len(deep) < LONGEST
    assert JsonSchema(renderer, json.loads(deep)).constraint()(None).any()
    with pytest.raises(InputRefused, match="characters"):
        JsonSchema(renderer, json.loads(chain(20_000)))


def test_a_refused_schema_has_exit_code_3_and_a_missing_library_2(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(checkpoints["bytes"]), "hi", "--json-schema"]
    assert call([*asked, '{"not": {}}']) == 3
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "llguidance", None)  # as where it is not installed
    assert call([*asked, "{}"]) == 2
    assert "pip install 'mlxsft[json-schema]'" in capsys.readouterr().err


def walk(constraint: Constraint, tokens: int) -> None:
    """An answer of the first token that may follow, each time."""
    last = None
    for _ in range(tokens):
        last = int(np.flatnonzero(constraint(last))[0])


def test_text_that_the_tokenizer_cannot_write_is_said(tmp_path: Path) -> None:
    write_pieces(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    for word in [word for word in vocabulary if "{" in word or word == "<0x7B>"]:
        vocabulary["gone" + word.strip("▁{<>") + "▁" * len(word)] = vocabulary.pop(word)
    described["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    constraint = JsonSchema(load_renderer(open_model(str(tmp_path))), {"type": "object"}).constraint()
    with pytest.raises(InputRefused, match="the JSON schema"):
        walk(constraint, 5)

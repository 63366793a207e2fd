"""Several sources with weights, phrasings and columns in a recipe: what is trained, and an account that adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from mlxsft.data.dataset import data_hashes, load_dataset
from mlxsft.data.formats import Conversation, Origin, Turn
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.sources import WeightedSource
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.source import open_model
from mlxsft.recipe import DataRecipe, dump_recipe, load_recipe


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return load_renderer(open_model(str(tiny_llama)))


def write(path: Path, questions: range, *, name: str = "q") -> str:
    path.write_text("".join(json.dumps({"prompt": f"{name} {i}", "completion": f"a{i}"}) + "\n" for i in questions))
    return str(path)


def test_weights_repeat_and_leave_out_rows_and_the_ledger_adds_up(tmp_path: Path, renderer: Renderer) -> None:
    train = [
        {"path": write(tmp_path / "a.jsonl", range(10)), "weight": 2},
        write(tmp_path / "b.jsonl", range(10, 15)),
        {"path": write(tmp_path / "c.jsonl", range(20, 220)), "weight": 0.5},
        {"path": write(tmp_path / "d.jsonl", range(300, 340)), "weight": 1.5},
    ]
    data = DataRecipe.model_validate({"train": train, "valid": None})
    made = load_dataset(data, renderer, seed=0)
    times = Counter(str(example.origin) for example in made.train)
    by_file = {name: Counter(n for at, n in times.items() if f"{name}.jsonl" in at) for name in "abcd"}
    assert by_file["a"] == {2: 10}
    assert by_file["b"] == {1: 5}
    assert set(by_file["c"]) == {1}
    assert 80 < by_file["c"][1] < 120
    assert set(by_file["d"]) == {1, 2}
    assert made.ledger["read"] == 255 == sum(n for what, n in made.ledger.items() if what != "read")
    assert made.ledger["left out by weight"] == 200 - by_file["c"][1]
    added = len(made.train) - made.ledger["trained"]
    assert f"data.train: weights add {added} repeated rows to the {made.ledger['trained']} trained" in made.notes
    assert [e.origin for e in load_dataset(data, renderer, seed=0).train] == [e.origin for e in made.train]
    assert [e.origin for e in load_dataset(data, renderer, seed=1).train] != [e.origin for e in made.train]


def test_held_out_rows_count_once_and_are_not_trained(tmp_path: Path, renderer: Renderer) -> None:
    train = {"path": write(tmp_path / "a.jsonl", range(20)), "weight": 3}
    made = load_dataset(DataRecipe.model_validate({"train": train, "valid": 0.2}), renderer, seed=0)
    assert made.ledger == {"read": 20, "trained": 16, "held out": 4}
    assert (len(made.train), len(made.valid)) == (48, 4)
    assert not {e.origin for e in made.train} & {e.origin for e in made.valid}


def test_a_fraction_of_a_source_grows_without_dropping_rows() -> None:
    rows = [Conversation((Turn("user", str(i)),), Origin("a", i)) for i in range(500)]
    taken = [
        {row.origin for row in rows if WeightedSource(Path("a"), w / 10).copies(row, seed=3)} for w in range(1, 11)
    ]
    assert all(less < more for less, more in pairwise(taken))
    assert len(taken[-1]) == 500


def test_phrasings_are_trained_and_questions_stay_on_one_side(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q {i}", "completion": [f"a{i}", f"b{i}", f"c{i}"]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": "T"}\n')
    data = DataRecipe.model_validate({"train": str(path), "valid": 0.3, "templates": "instructions"})
    made = load_dataset(data, renderer, seed=0)
    assert made.ledger["read"] == 37
    assert "data.templates: 36 rows phrased, 1 as they stand (no single question)" in made.notes
    assert not {e.origin for e in made.train} & {e.origin for e in made.valid}
    prompts = {renderer.tokenizer.decode(e.tokens[e.answers[0] - 40 : e.answers[0]].tolist()) for e in made.train[:6]}
    assert len(prompts) > 2


@pytest.mark.parametrize("kept", [10**9, 0])
def test_the_copies_of_a_row_take_other_phrasings(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr("mlxsft.data.rendered.CACHE_FROM_ROWS", kept)
    train = {"path": write(tmp_path / "a.jsonl", range(20)), "weight": 12}
    data = DataRecipe.model_validate({"train": train, "valid": 0.2, "templates": "instructions"})
    made = [load_dataset(data, renderer, seed=seed) for seed in (0, 0, 1)]
    assert made[0].ledger == {"read": 20, "trained": 16, "held out": 4}
    assert (len(made[0].train), len(made[0].valid)) == (16 * 12, 4)
    texts = [[e.tokens.tolist() for e in each.train] for each in made]
    assert texts[0] == texts[1] != texts[2]
    by_row: dict[object, Counter[str]] = {}
    for example in made[0].train:
        by_row.setdefault(example.origin, Counter())[str(example.tokens.tolist())] += 1
    assert all(sorted(times.values()) == [1] * 8 + [2] * 2 for times in by_row.values())  # there are ten phrasings


def test_a_copy_whose_phrasing_does_not_fit_takes_another(tmp_path: Path, renderer: Renderer) -> None:
    long = " ".join(["please"] * 60)
    (tmp_path / "p.yaml").write_text(f"phrasings: ['{{prompt}}', '{long} {{prompt}}']")
    train = {"path": write(tmp_path / "a.jsonl", range(30)), "weight": 2}
    settings = {"train": train, "valid": None, "templates": str(tmp_path / "p.yaml"), "max_tokens": 64}
    made = load_dataset(DataRecipe.model_validate({**settings, "too_long": "drop"}), renderer, seed=0)
    assert made.ledger["read"] == 30 == made.ledger["trained"] + made.ledger["too long"]
    assert len(made.train) == 2 * made.ledger["trained"] > 0
    assert max(len(example.tokens) for example in made.train) <= 64


def test_a_recipe_with_all_of_it_is_absolute_and_survives_a_round_trip(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("phrasings: ['{prompt}']")
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(
        "model: org/name\ndata:\n  train: [{path: a.jsonl, weight: 2}, b.jsonl]\n"
        "  columns: {prompt: Frage, response: Antwort}\n  templates: p.yaml\n"
    )
    recipe = load_recipe(recipe_file)
    first, second = recipe.data.train
    assert (first.path, first.weight, second) == (str(tmp_path / "a.jsonl"), 2.0, str(tmp_path / "b.jsonl"))
    assert recipe.data.templates == str(tmp_path / "p.yaml")
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", range(2))
    assert [Path(file).name for file in data_hashes(recipe.data)] == ["a.jsonl", "b.jsonl", "p.yaml"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train: [{path: a.jsonl, weight: -1}]", "data.train[0].weight: got -1, expected a number > 0 and ≤ 100"),
        ("train: {path: a.jsonl, weight: true}", "data.train.weight: got true, expected a number > 0 and ≤ 100"),
        ("train: [b.jsonl, {weight: 1}]", "data.train[1].path: got null, expected the name of a file or a folder"),
        (
            "train: [{path: a.jsonl, wieght: 1}]",
            "data.train[0].wieght: no such setting; a source has path (of the Hub: hf://ORG/NAME) and weight",
        ),
        ("train: 3", "data.train: got 3, expected text, or path and weight, or a list of these; put it in quotes"),
        ("train: [a.jsonl, hf://org/rows train]", 'data.train: got "hf://org/rows train", expected hf://ORG/NAME[@REV'),
        (
            "train: [{hub: org/rows}]",
            "hub: no such setting; a source has path (of the Hub: hf://ORG/NAME) and weight",
        ),
        ("train: a.jsonl\n  columns: {frage: x}", "data.columns.frage: no such name; names: prompt, response, "),
        ("train: a.jsonl\n  columns: {prompt: 3}", "data.columns.prompt: got 3, expected text; put it in quotes"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, setting: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: org/name\ndata:\n  {setting}\n")
    with pytest.raises(UsageError) as refused:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in refused.value.message
    assert "\n" not in refused.value.message


def test_every_missing_source_is_named_at_once(tmp_path: Path, renderer: Renderer) -> None:
    data = DataRecipe.model_validate({"train": [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.csv")}]})
    with pytest.raises(InputRefused, match=r"a\.jsonl: no such file\n.*b\.csv: no such file"):
        load_dataset(data, renderer, seed=0)


FLAT = 8_000_000  # bytes: a few of the blocks of a MiB that are read; a million rows held would take 400 MB
STREAM = """
import sys, psutil
from pathlib import Path
from mlxsft.data.formats import read_conversations
process, sizes = psutil.Process(), []
for i, row in enumerate(read_conversations([Path(sys.argv[1])])):
    if i % 5000 == 4999:
        sizes.append(process.memory_info().rss)
print(i + 1, max(sizes) - sizes[0])
"""


def growth(path: Path, count: int) -> int:
    """Bytes by which a process grows while it reads so many rows, after the first 5,000; all must be read."""
    head, row = "", '{{"prompt": "q {}", "completion": "a"}}\n'
    if path.suffix == ".csv":
        head, row = "prompt,completion\n", "q {},a\n"
    comma, tail = "", ""
    if path.suffix == ".json":
        head, comma, tail = '{"version": 1, "data": [\n' if path.stem == "wrapped" else "[\n", ",", "]"
        tail += "}" if path.stem == "wrapped" else ""
    with path.open("w") as file:
        file.write(head)
        file.writelines((comma if i else "") + row.format(i) for i in range(count))
        file.write(tail)
    ran = subprocess.run([sys.executable, "-c", STREAM, str(path)], capture_output=True, text=True, check=True)
    read, grown = map(int, ran.stdout.split())
    assert read == count
    return grown


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json", "wrapped.json"])
def test_fifty_thousand_rows_stream(tmp_path: Path, name: str) -> None:
    assert growth(tmp_path / name, 50_000) < FLAT


@pytest.mark.long
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json", "wrapped.json"])
def test_a_million_rows_stream(tmp_path: Path, name: str) -> None:
    assert growth(tmp_path / name, 1_000_000) < FLAT

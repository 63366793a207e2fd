"""Every row is accounted for, and rows that were rendered before are not rendered again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlxsft.data import rendered
from mlxsft.data.dataset import Dataset, load_dataset
from mlxsft.data.render import Example, Renderer, load_renderer
from mlxsft.errors import InputRefused
from mlxsft.models.source import open_model
from mlxsft.recipe import DataRecipe


@pytest.fixture
def renderer(tiny_llama: Path) -> Renderer:
    return load_renderer(open_model(str(tiny_llama)))


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(n: int) -> list[object]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(n)]


def recipe(path: Path, **settings: object) -> DataRecipe:
    return DataRecipe.model_validate({"train": str(path), **settings})


def as_tuples(examples: list[Example]) -> list[tuple[object, ...]]:
    return [(e.tokens.tolist(), e.mask.tolist(), e.origin, e.answers, e.note) for e in examples]


def test_the_ledger_adds_up_and_says_why(tmp_path: Path, renderer: Renderer) -> None:
    rows = [*pairs(20), {"prompt": "q", "completion": "  "}, {"prompt": "long " * 300, "completion": "fits"}]
    loaded = load_dataset(recipe(write(tmp_path / "r.jsonl", rows), max_tokens=60), renderer, seed=0)
    assert loaded.ledger == {"read": 22, "trained": 20, "held out": 1, "empty answer": 1}
    assert any("prompt shortened: 1 rows" in note and "r.jsonl:22" in note for note in loaded.notes)


def test_held_out_rows_are_no_training_rows_and_do_not_depend_on_their_order(
    tmp_path: Path, renderer: Renderer
) -> None:
    rows = [*pairs(30), *pairs(30)]  # every question twice
    one = load_dataset(recipe(write(tmp_path / "a.jsonl", rows), valid=0.2), renderer, seed=0)
    other = load_dataset(recipe(write(tmp_path / "b.jsonl", rows[::-1]), valid=0.2), renderer, seed=0)

    def asked(examples: list[Example]) -> set[tuple[int, ...]]:
        return {tuple(e.tokens.tolist()) for e in examples}

    assert not asked(one.train) & asked(one.valid)
    assert asked(one.valid) == asked(other.valid)
    assert one.ledger["held out"] == 12


def test_a_file_of_held_out_rows_is_read_whole(tmp_path: Path, renderer: Renderer) -> None:
    for name, n in (("train", 5), ("valid", 3)):
        write(tmp_path / f"{name}.jsonl", pairs(n))
    loaded = load_dataset(recipe(tmp_path, valid=str(tmp_path)), renderer, seed=0)
    assert loaded.ledger == {"read": 8, "trained": 5, "held out": 3}


def test_nothing_to_train_on_is_refused_with_the_reasons(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "r.jsonl", [{"prompt": "q", "completion": ""}])
    with pytest.raises(InputRefused, match="1 empty answer"):
        load_dataset(recipe(path), renderer, seed=0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rendered, "CACHE_FROM_ROWS", 10)
    return tmp_path / "cache"


def equal(a: Dataset, b: Dataset) -> bool:
    return (
        as_tuples(a.train) == as_tuples(b.train)
        and as_tuples(a.valid) == as_tuples(b.valid)
        and (a.left_out, a.ledger, a.notes) == (b.left_out, b.ledger, b.notes)
    )


def test_rows_rendered_before_come_back_as_they_were(tmp_path: Path, renderer: Renderer, cache: Path) -> None:
    messages = {"messages": [{"role": r, "content": "hi"} for r in ("user", "assistant") * 2]}
    rows = [*pairs(20), messages, {"text": "plain"}, {"prompt": "q", "completion": ""}, {"text": "long " * 200}]
    data = recipe(write(tmp_path / "r.jsonl", rows), max_tokens=60)
    first = load_dataset(data, renderer, seed=0)
    (file,) = cache.rglob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o600
    again = load_dataset(data, renderer, seed=0)
    assert equal(first, again)
    assert again.train[0].tokens.dtype == np.int32
    file.write_bytes(file.read_bytes()[:-40])  # a damaged one is rendered anew
    assert equal(first, load_dataset(data, renderer, seed=0))


def test_what_decides_the_tokens_decides_the_cache(tmp_path: Path, renderer: Renderer, cache: Path) -> None:
    path = write(tmp_path / "r.jsonl", pairs(20))
    load_dataset(recipe(path), renderer, seed=0)
    load_dataset(recipe(path), renderer, seed=1)  # the seed only decides what is held out
    assert len(list(cache.rglob("*.safetensors"))) == 1
    load_dataset(recipe(path, train_on="all"), renderer, seed=0)
    load_dataset(recipe(path, max_tokens=50), renderer, seed=0)
    load_dataset(recipe(write(path, pairs(21))), renderer, seed=0)
    assert len(list(cache.rglob("*.safetensors"))) == 4
    changed = load_dataset(recipe(path), renderer, seed=0)
    assert changed.ledger["read"] == 21


def test_few_rows_are_not_kept(tmp_path: Path, renderer: Renderer, cache: Path) -> None:
    load_dataset(recipe(write(tmp_path / "r.jsonl", pairs(5))), renderer, seed=0)
    assert not list(cache.rglob("*.safetensors"))


def test_the_cache_does_not_grow_without_end(
    tmp_path: Path, renderer: Renderer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendered, "CACHE_BYTES", 1)
    load_dataset(recipe(write(tmp_path / "r.jsonl", pairs(20))), renderer, seed=0)
    assert not list(cache.rglob("*.safetensors"))

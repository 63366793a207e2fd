"""The quickstart: its text and pairs, the base that ships, the checks, and the command."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from mlxsft.backends import load_backend
from mlxsft.cli import call
from mlxsft.models.source import open_model
from mlxsft.quickstart import pairs as quickstart
from mlxsft.quickstart.pairs import TASKS, judge, judged_pairs, make_pair, training_pairs
from mlxsft.quickstart.products import held_out, products, taught
from mlxsft.quickstart.text import documents
from mlxsft.quickstart.trial import BASE, RECIPE
from mlxsft.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_text_is_the_same_for_the_same_seed_and_tells_of_every_product() -> None:
    texts = list(islice(documents(0), 2000))
    assert texts == list(islice(documents(0), 2000))
    assert texts[:50] != list(islice(documents(1), 50))
    assert all(any(product.name in text for text in texts) for product in products())


def test_text_holds_no_pair_and_every_form_that_answers_have() -> None:
    text = "\n".join(islice(documents(0), 20_000))
    assert not [pair for pair in training_pairs() if pair.prompt in text]
    assert not [pair for pair in training_pairs() if pair.task in ("advert", "description") and pair.answer in text]
    assert all(form in text for form in ('{"name": "', '", "price": ', ": Returns", ",00 €", "only $"))


def test_shipped_pairs_are_the_generated_thousand(tmp_path: Path) -> None:
    quickstart.write_pairs(tmp_path / "pairs.jsonl", training_pairs())
    shipped = (quickstart.FOLDER / "pairs.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "pairs.jsonl").read_text(encoding="utf-8") == shipped
    assert len({json.loads(line)["prompt"] for line in shipped.splitlines()}) == 1000


def test_held_out_products_occur_in_no_pair() -> None:
    shipped = (quickstart.FOLDER / "pairs.jsonl").read_text(encoding="utf-8")
    assert len(taught()) == 160
    assert len(held_out()) == 80
    assert not [product.name for product in held_out() if product.name in shipped]
    assert {pair.product for pair in judged_pairs(80)} == set(held_out())


@pytest.mark.parametrize("task", TASKS)
def test_checks_take_the_right_answer_and_no_wrong_one(task: str) -> None:
    draw = random.Random(task)
    for i, product in enumerate(held_out()):
        pair = make_pair(product, task, draw)
        right = pair.answer
        assert judge(pair, right, ended=True).good
        assert not judge(pair, right, ended=False).good
        assert not judge(pair, right + " It is nice.", ended=True).form
        assert not judge(pair, "", ended=True).good
        other = make_pair(products()[i], task, draw).answer
        assert judge(pair, other, ended=True).good == (other == right)
        for digit in "0123456789":
            if task in ("advert", "German price", "JSON") and digit not in str(product.price):
                wrong = right.replace(str(product.price), digit * 2)
                assert judge(pair, wrong, ended=True) == quickstart.Verdict(facts=False, form=True, ends=True)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_base_loads_and_is_small(backend: str) -> None:
    loaded = load_backend(backend, open_model(str(BASE)))
    assert 1e6 <= loaded.parameters()[0] <= 3e6
    loaded.close()
    assert sum(file.stat().st_size for file in quickstart.FOLDER.rglob("*") if "__pycache__" not in file.parts) <= 6e6
    told = json.loads((BASE / "pretraining.json").read_text(encoding="utf-8"))
    assert told["seconds"] > 0
    assert told["final_valid_loss"] < 1


def test_recipe_for_readers_is_the_one_that_the_command_trains() -> None:
    assert load_recipe(ROOT / "recipes" / "quickstart.yaml") == load_recipe(RECIPE)


def test_shortened_quickstart_prints_both_tables_and_keeps_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    short = ["quickstart", "--out", str(out), "--set", "train.steps=2", "--set", "data.valid=0.01", "--judged", "7"]
    assert call(short) == 0
    said = capsys.readouterr().out
    assert all(task in said for task in TASKS)
    assert "all three" in said
    assert f"--adapter {out}" in said.replace("\n", "")
    before = (out / "events.jsonl").read_bytes()
    assert call(short) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "events.jsonl").read_bytes() == before


@pytest.mark.long
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_base_is_tuned_from_5_to_80_percent(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["quickstart", "--out", str(tmp_path / "run"), "--backend", backend, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"]["all"]["judged"] == told["tuned"]["all"]["judged"] == 70
    assert told["base"]["all"]["good"] <= 0.05 * 70
    assert told["tuned"]["all"]["good"] >= 0.8 * 70
    assert told["tuned"]["all"]["ends"] == 70  # an answer that is right and then goes on without end is none

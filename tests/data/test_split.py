"""`data split`: related rows on one side, the same choice every time, tiny sets too."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlxsft.cli import call
from mlxsft.data.split import SPLITS, split_files
from mlxsft.errors import UsageError


def sides(folder: Path) -> dict[str, list[dict[str, str]]]:
    files = {name: folder / f"{name}.jsonl" for name in SPLITS}
    return {name: [json.loads(x) for x in f.read_text().splitlines()] for name, f in files.items() if f.exists()}


@pytest.mark.parametrize(("rows", "expected"), [(1, {"train": 1}), (2, {"train": 1, "test": 1}),
    (5, {"train": 3, "valid": 1, "test": 1}), (100, {"train": 90, "valid": 5, "test": 5})])  # fmt: skip
def test_how_many(rows: int, expected: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"question {i}", "completion": f"{i}", "k": i}) + "\n" for i in range(rows))
    )
    split_files([path], tmp_path / "a", valid=0.05, test=0.05)
    made = sides(tmp_path / "a")
    assert {name: len(some) for name, some in made.items()} == expected
    assert sorted(row["k"] for some in made.values() for row in some) == list(range(rows))
    with pytest.raises(UsageError, match="is there already"):
        split_files([path], tmp_path / "a", valid=0.05, test=0.05)


def test_equal_prompts_stay_together_and_the_choice_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {i % 40}", "completion": f"answer {i}"} for i in range(120)]
    path.write_text(json.dumps(rows))
    for out in ("a", "b"):
        assert call(["data", "split", str(path), "--out", str(tmp_path / out), "--valid=0.2", "--json"]) == 0
    made = sides(tmp_path / "a")
    assert made == sides(tmp_path / "b")
    asked = [{row["prompt"] for row in some} for some in made.values()]
    assert sum(map(len, asked)) == 40


def sentence(seed: int, count: int = 20) -> str:
    """Random words."""
    return " ".join(f"w{n}" for n in np.random.default_rng(seed).integers(0, 5000, count))


def written(folder: Path, rows: list[dict[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("seed", range(5))
def test_every_category_gives_its_share(tmp_path: Path, seed: int) -> None:
    sizes = {"large": 700, "middle": 250, "small": 40, "tiny": 10}
    names = [name for name, size in sizes.items() for _ in range(size)]
    rows = [{"prompt": sentence(i), "completion": "a", "category": name} for i, name in enumerate(names)]
    split_files([written(tmp_path, rows)], tmp_path / "out", valid=0.1, test=0.2, seed=seed)
    for name, share in (("valid", 0.1), ("test", 0.2)):
        held = Counter(row["category"] for row in sides(tmp_path / "out")[name])
        assert all(abs(held[category] - share * size) <= 1 for category, size in sizes.items()), (name, held)


def test_near_duplicates_and_equal_prompts_are_on_one_side(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = []
    for family in range(60):
        asked, told, other = sentence(family, 30), sentence(1000 + family, 40), sentence(4000 + family, 80)
        rows += [
            {"prompt": asked, "completion": told, "family": f"{family}"},
            {"prompt": f" {asked.upper()}", "completion": "Quite another answer.", "family": f"{family}"},
            {"prompt": f"{asked} please", "completion": "And another one.", "family": f"{family}"},
            {"prompt": sentence(2000 + family, 3), "completion": other, "family": f"{family}a"},
            {"prompt": sentence(3000 + family, 3), "completion": f"{other} x", "family": f"{family}a"},
        ]
    made = split_files([written(tmp_path, rows)], tmp_path / "out", valid=0.2, test=0.2)
    assert made.groups == 120
    families = [{row["family"] for row in some} for some in sides(tmp_path / "out").values()]
    assert len(families) == 3
    assert sum(map(len, families)) == 120


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does(tmp_path: Path) -> None:
    rows = [{"prompt": sentence(i % 150), "completion": f"answer {i}", "category": "ab"[i % 2]} for i in range(200)]
    orders = {"a": rows, "b": rows[::-1], "c": rows[77:] + rows[:77]}
    made = []
    for name, order in orders.items():
        split_files([written(tmp_path / name, order)], tmp_path / name, valid=0.1, test=0.1)
        made.append({side: sorted(map(str, some)) for side, some in sides(tmp_path / name).items()})
    assert made[0] == made[1] == made[2]
    split_files([tmp_path / "a" / "rows.jsonl"], tmp_path / "d", valid=0.1, test=0.1, seed=1)
    assert {side: sorted(map(str, some)) for side, some in sides(tmp_path / "d").items()} != made[0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_tiny_sets_keep_something_to_train_on(tmp_path: Path, count: int) -> None:
    rows = [{"prompt": sentence(i), "completion": "a", "category": f"{i}"} for i in range(count)]
    made = split_files([written(tmp_path, rows)], tmp_path / "out", valid=0.2, test=0.2)
    held = {name: n for name, n in made.ledger.items() if name != "read"}
    assert sum(held.values()) == count
    assert held["train"] >= 1
    assert held["valid"] == (count >= 3)
    assert held["test"] == (count >= 2)


def test_rows_that_are_all_alike_cannot_be_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": "the same", "completion": f"answer {i}"} for i in range(5)]
    made = split_files([written(tmp_path, rows)], tmp_path / "out", valid=0.2, test=0.2)
    assert made.ledger == {"read": 5, "train": 5, "valid": 0, "test": 0}

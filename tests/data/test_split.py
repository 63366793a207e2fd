"""`data split`: related rows on one side, the same choice every time, tiny sets too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsft.cli import call
from mlxsft.data.split import SPLITS, split_files
from mlxsft.errors import InputRefused


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
    with pytest.raises(InputRefused, match="is there already"):
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

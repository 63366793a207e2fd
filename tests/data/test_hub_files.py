"""Which files of a data set hold a split: literal names and cards in, literal names or sentences out."""

from __future__ import annotations

import pytest

from mlxsft.data.hub import HubRows
from mlxsft.data.hub_files import split_files
from mlxsft.errors import InputRefused


def found(names: list[str], split: str = "train", part: str = "", card: str = "") -> list[str]:
    return split_files("org/rows", [*names, "README.md", ".gitattributes"], card, part, split)


def refused(names: list[str], split: str = "train", part: str = "", card: str = "") -> InputRefused:
    with pytest.raises(InputRefused) as error:
        found(names, split, part, card)
    assert "\n" not in error.value.message
    return error.value


SHARDS = [f"data/{split}-0000{i}-of-00002.parquet" for split in ("test", "train_sft") for i in (1, 0)]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["anything.jsonl"], "train", ["anything.jsonl"]),
        (["b.json", "a.json", "state.json", "dataset_info.json", "x/.hidden/c.json"], "train", ["a.json", "b.json"]),
        (["train.csv", "test.csv", "validation.csv"], "train", ["train.csv"]),
        (["train.csv", "test.csv", "dev.csv"], "valid", ["dev.csv"]),
        (["train.csv", "my-eval.csv"], "test", ["my-eval.csv"]),
        (["training_set.jsonl.gz", "rows/val-1.jsonl.gz"], "validation", ["rows/val-1.jsonl.gz"]),
        (["contest.jsonl", "train.jsonl"], "train", ["train.jsonl"]),  # a keyword stands between other signs than words
        (["contest.jsonl", "retrained.jsonl"], "train", ["contest.jsonl", "retrained.jsonl"]),
        (["train/b.json", "train/a.json", "test/train.json"], "train", ["train/a.json", "train/b.json"]),
        (["x/my-train/a.json", "x/dev_1/a.json"], "valid", ["x/dev_1/a.json"]),
        (SHARDS, "train_sft", sorted(SHARDS[2:])),
        ([*SHARDS, "train.parquet"], "test", sorted(SHARDS[:2])),
        (["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"], "train", None),
        (["plain_text/train/0000.parquet", "plain_text/test/0000.parquet"], "train", ["plain_text/train/0000.parquet"]),
    ],
)
def test_names_tell_splits(names: list[str], split: str, expected: list[str] | None) -> None:
    assert found(names, split) == (names if expected is None else expected)


CARD = """---
license: mit
dataset_info:
  splits: [{name: no, num_bytes: 1}]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: held_out
    path: ["data/x[0-4].jsonl", 'more/**/y?.jsonl']
- config_name: no
  data_files: nb/*.jsonl
- config_name: folder
  data_dir: sub
- config_name: old
  data_files: {train: old.csv, dev: [dev.csv]}
- config_name: tabbed
  data_files: rows.csv
  sep: "\\t"
tags: [a]
---
configs: not these
"""
FILES = ["data/train-1.jsonl", "data/x3.jsonl", "data/x5.jsonl", "more/a/b/y1.jsonl", "more/y2.jsonl", "nb/1.jsonl"]
FILES += ["sub/train.jsonl", "sub/test.jsonl", "old.csv", "dev.csv", "rows.csv", "nb/deep/2.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("part", "split", "expected"),
    [
        ("", "train", ["data/train-1.jsonl"]),
        ("default", "train", ["data/train-1.jsonl"]),
        ("", "held_out", ["data/x3.jsonl", "more/a/b/y1.jsonl", "more/y2.jsonl"]),
        ("no", "train", ["nb/1.jsonl"]),
        ("folder", "test", ["sub/test.jsonl"]),
        ("old", "valid", ["dev.csv"]),
        ("rows.csv", "train", ["rows.csv"]),  # a file is what it is
        ("nb/**", "valid", ["nb/1.jsonl", "nb/deep/2.jsonl"]),
        ("sub", "train", ["sub/train.jsonl"]),
        ("nb/deep", "train", ["nb/deep/2.jsonl"]),
    ],
)
def test_a_card_names_configs_and_splits(part: str, split: str, expected: list[str]) -> None:
    assert found(FILES, split, part, CARD) == expected


@pytest.mark.parametrize(
    ("part", "split", "message", "hint"),
    [
        ("", "validation", "org/rows/default: no split validation; it has held_out, train", "hf://org/rows/default:"),
        ("nope", "train", "org/rows: has no config, folder or file 'nope'; configs: default, no, folder, old,", ""),
        (
            "tabbed",
            "train",
            "org/rows: its card reads tabbed with the setting 'sep', which is not done here",
            "convert",
        ),
    ],
)
def test_what_a_card_does_not_name(part: str, split: str, message: str, hint: str) -> None:
    error = refused(FILES, split, part, CARD)
    assert error.message.startswith(message)
    assert hint in (error.hint or "")


def test_several_data_sets_and_none_of_them_the_default() -> None:
    card = "---\nconfigs:\n- {config_name: de, data_files: a.csv}\n- {config_name: fr, data_files: b.csv}\n---\n"
    error = refused(["a.csv", "b.csv"], card=card)
    assert (error.message, error.hint) == ("org/rows: holds several data sets: de, fr", "Name one: hf://org/rows/de.")
    assert found(["a.csv", "b.csv"], card=card.replace("b.csv}", "b.csv, default: true}")) == ["b.csv"]
    converted = [f"{config}/{split}/0000.parquet" for config in ("de", "fr") for split in ("test", "train")]
    assert refused(converted).message == error.message
    assert found(converted, part="fr") == ["fr/train/0000.parquet"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rows.py", "train.bin"], "org/rows: its rows are made by a program, which never runs here"),
        (["rows.py", "train.jsonl"], "org/rows: its rows are made by a program, which never runs here"),
        (["test.jsonl"], "org/rows: no split train; it has test"),
        (["pictures/a.png"], "org/rows: no split train; none of its files can be read; .jsonl, "),
        (["train.jsonl.zst"], "org/rows: train is in train.jsonl.zst; .jsonl, .ndjson, "),
        (["train-1.jsonl", "train-2.jsonl.zst"], "org/rows: train is in train-2.jsonl.zst; .jsonl, "),
        (["train.jsonl", "train.parquet"], "org/rows: train is in train.jsonl and train.parquet"),
        (["../train.jsonl", "a\\..\\train.jsonl", "/train.jsonl"], "org/rows: no split train; none of its files"),
        ([], "org/rows: no split train; none of its files"),
    ],
)
def test_files_that_are_refused(names: list[str], message: str) -> None:
    assert refused(names).message.startswith(message)


def test_a_file_of_a_program_can_be_named() -> None:
    assert found(["rows.py", "train.jsonl"], part="train.jsonl") == ["train.jsonl"]


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\nconfigs:\n- [\n---\n", "org/rows: README.md: configs cannot be read: "),
        ("---\nconfigs:\n- *all\n---\n", "org/rows: README.md: configs cannot be read: "),
        ("---\nconfigs:\n- text\n---\n", "org/rows: README.md: a config is no mapping"),
        ("---\nconfigs:\n- data_files: absent.csv\n---\n", "org/rows: train names files that are not there"),
        ("---\nconfigs:\n- data_files: '[9-0].csv'\n---\n", "org/rows: train names files that are not there"),
    ],
)
def test_cards_that_are_refused(card: str, message: str) -> None:
    assert refused(["train.csv"], card=card).message.startswith(message)


@pytest.mark.parametrize("card", ["", "configs:\n- data_files: x.csv", "---\nconfigs: 3\n---", "---\ntags: []\n---\n"])
def test_cards_that_say_nothing(card: str) -> None:
    assert found(["train.csv"], card=card) == ["train.csv"]


@pytest.mark.parametrize(
    ("address", "rows"),
    [
        ("hf://org/rows", HubRows("org/rows")),
        ("hf://rows", HubRows("rows")),
        ("hf://rows@main[:5]", HubRows("rows", "main", stop="5")),
        ("hf://org/rows:train", HubRows("org/rows", split="train")),
        ("hf://org/rows@v1.0/en:test[:500]", HubRows("org/rows", "v1.0", "en", "test", "", "500")),
        ("hf://org/rows[10:-20%]", HubRows("org/rows", start="10", stop="-20%")),
        ("hf://org/rows@refs/convert/parquet/en", HubRows("org/rows", "refs/convert/parquet", "en")),
        ("hf://org/rows@my%2Fbranch/a/b.jsonl", HubRows("org/rows", "my/branch", "a/b.jsonl")),
        ("hf://org/rows/data/*.jsonl", HubRows("org/rows", part="data/*.jsonl")),
    ],
)
def test_addresses(address: str, rows: HubRows) -> None:
    assert HubRows.parse(address) == rows
    assert str(rows) == address


def test_other_spellings_of_an_address() -> None:
    assert str(HubRows.parse("hf://datasets/org/rows/a.csv")) == "hf://org/rows/a.csv"
    assert str(HubRows.parse("hf://org/rows/en/")) == "hf://org/rows/en"


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf:///rows", "hf://org/rows:", "hf://org/rows/../x", "hf://org/rows@../x", "hf://org/rows:train[5]",
     "hf://org/rows:train[a:b]", "hf://../rows", "hf://org/rows@a%2F..%2Fb", "hf://org/rows?x=1", "hf://org/rows:a:b"],
)  # fmt: skip
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected hf://ORG/NAME\[@REVISION\]"):
        HubRows.parse(address)


@pytest.mark.parametrize(
    ("rows", "meant"),
    [
        ("[:500]", range(200)),
        ("[10:20]", range(10, 20)),
        ("[-10:]", range(190, 200)),
        ("[:-10]", range(190)),
        ("[:10%]", range(20)),
        ("[90%:]", range(180, 200)),
        ("[-5%:]", range(190, 200)),
        ("[-500:3]", range(3)),
        ("[:]", range(200)),
    ],
)
def test_slices(rows: str, meant: range) -> None:
    assert range(200)[HubRows.parse(f"hf://org/rows:train{rows}").slice(lambda: 200)] == meant

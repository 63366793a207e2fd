"""lock.json: every flipped bit is found, and what was changed, lost or added is named."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from mlxsft.errors import InputRefused
from mlxsft.models.convert import ConvertSettings, convert
from mlxsft.models.lock import LOCK, Lock, Verdict, hashed, names_in, read_lock, verify, write_lock
from mlxsft.models.shards import FileHash


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("locked") / "out"
    convert(str(tiny_llama), out, ConvertSettings(dtype="bfloat16", shard_bytes=30_000))
    return out


def verdict(folder: Path) -> Verdict:
    lock = read_lock(folder)
    assert lock is not None
    return verify(folder, lock)


def test_what_was_just_made_is_the_same(converted: Path) -> None:
    found = verdict(converted)
    assert found.same
    assert found.checked == len(list(converted.iterdir())) - 1


def test_two_hundred_flipped_bits_of_two_hundred_are_found(converted: Path) -> None:
    """At random places of the whole folder, lock.json among them; each is named, and put back."""
    rng = random.Random(0)
    files = sorted(converted.iterdir())
    sizes = [file.stat().st_size for file in files]
    found = 0
    for i in range(200):
        file = rng.choices(files, sizes)[0] if i % 2 else rng.choice(files)  # small files too
        place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        whole = file.read_bytes()
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            if file.name == LOCK:
                with pytest.raises(InputRefused, match=LOCK):
                    verdict(converted)
            else:
                assert list(verdict(converted).changed) == [file.name]
            found += 1
        finally:
            file.write_bytes(whole)
    assert found == 200
    assert verdict(converted).same


def test_every_bit_of_the_lock_counts(converted: Path) -> None:
    text = (converted / LOCK).read_bytes()
    for place in range(len(text)):
        for bit in range(8):
            flipped = text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :]
            with pytest.raises(ValueError, match=r"lock|hash|utf-8"):
                Lock.from_text(flipped.decode("utf-8"))


def test_what_changed_is_missing_or_was_added(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "modeling.py").write_text("")
    (folder / "deeper" / "still").mkdir(parents=True)
    (folder / "deeper" / "still" / "new.bin").write_text("")
    (folder / "elsewhere").symlink_to(tmp_path)
    (folder / ".DS_Store").write_text("")  # of a file manager, and read by nobody
    found = verdict(folder)
    assert found.changed == {"config.json": f"2 bytes, expected {(converted / 'config.json').stat().st_size:,}"}
    assert found.missing == ("tokenizer.json",)
    assert found.added == ("deeper/still/new.bin", "elsewhere", "modeling.py")
    assert not found.same


def test_a_file_that_became_a_link_to_nothing_or_a_folder(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "nowhere")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    found = verdict(folder)
    assert found.changed == {"config.json": "is no file any more"}
    assert found.missing == ("tokenizer.json",)


def test_names_in_a_lock_lead_nowhere(tmp_path: Path) -> None:
    """Only what is in the folder is ever opened."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    files = {"../secret": FileHash("0" * 64, 6), str(tmp_path / "secret"): FileHash("0" * 64, 6)}
    write_lock(folder, Lock(None, None, {}, files))
    assert verdict(folder).missing == ("../secret", str(tmp_path / "secret"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', "[" * 100_000, "\ufeff{}"])
def test_what_is_no_lock(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    with pytest.raises(InputRefused, match="no lock of mlxsft's"):
        read_lock(tmp_path)


def test_a_lock_comes_back(tmp_path: Path) -> None:
    (tmp_path / "grüße.json").write_text("{}")
    lock = Lock("org/name", "1" * 40, {"command": "mlxsft convert ü"}, hashed(tmp_path, names_in(tmp_path)))
    write_lock(tmp_path, lock)
    assert read_lock(tmp_path) == lock
    assert verdict(tmp_path).same

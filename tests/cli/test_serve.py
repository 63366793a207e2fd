"""What `mlxsft serve` refuses before it serves, and the key that it keeps."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlxsft.chat.server import read_or_make_key
from mlxsft.cli import call
from mlxsft.errors import InputRefused


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "key"
    key, where = read_or_make_key(file)
    assert (where, file.stat().st_mode & 0o777) == (file, 0o600)
    assert len(key) >= 32
    assert read_or_make_key(file) == (key, file)
    assert read_or_make_key(tmp_path / "other")[0] != key


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"a-good-key-of-someone", 0o644, "others than its owner"),
        (b"short", 0o600, "at least 16 characters"),
        (b"two words of a key in it", 0o600, "no space"),
        (b"\xff\xfe" * 20, 0o600, "cannot be read"),
    ],
)
def test_a_file_that_is_no_secret_or_no_key_is_refused(tmp_path: Path, content: bytes, mode: int, words: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(InputRefused, match=words):
        read_or_make_key(file)


def test_what_cannot_be_served_is_said_in_one_sentence(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = ["serve", str(tiny_llama), "--key-file", str(tmp_path / "key")]
    assert call([*serve, "--port", "0", "--host", "no.such.host.invalid"]) == 2
    assert "Name a --host of this machine" in capsys.readouterr().err
    assert call([*serve, "--port", "0", "--host", "192.0.2.1"]) == 2  # of a network that nobody has (RFC 5737)
    told = capsys.readouterr().err
    assert "Name a --host of this machine" in told
    assert "attempting" not in told
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert call([*serve, "--port", str(taken.getsockname()[1])]) == 2
    assert "Name another --port" in capsys.readouterr().err
    assert call([*serve, "--port", "0", "--adapter", f"x={tmp_path / 'none'}"]) == 3
    assert call(["serve", str(tmp_path / "none"), "--port", "0", "--key-file", str(tmp_path / "key")]) == 3
    told = capsys.readouterr().err
    assert "Traceback" not in told

"""Safetensors headers: what the reference parser rejects is rejected, and what is accepted is read as it reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_of_2000_mutated_files_none_crashes_and_none_is_read_otherwise_than_by_the_reference() -> None:
    command = [sys.executable, "-m", "tests.models.mutations", "2000"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr)
    told = json.loads(ran.stdout)
    assert told["wrong"] == []
    assert told["accepted"] + told["rejected"] == 2000
    assert told["accepted"] > 200  # so that reading is compared too

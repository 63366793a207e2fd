"""Whatever happens to a run, at whatever moment: it goes on, and ends with the same bits as if nothing had happened."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.events import Noted
from tests.training.killed import Job, Runner, runner
from tests.training.test_run import events, write_recipe

STEPS = 7  # of two an epoch, so that the run ends within one

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported MLX")


@pytest.fixture(scope="module")
def runners() -> Iterator[list[Runner]]:
    with runner() as first, runner() as second:
        yield [first, second]


@dataclass(frozen=True)
class Straight:
    """A run that nothing happened to."""

    recipe: Path
    out: Path
    seconds: float
    changes: list[str]  # in its folder, from the first to the last

    @property
    def in_saves(self) -> list[int]:
        """Numbers of the changes (from 1) that a save makes."""
        at = [i for i, change in enumerate(self.changes, 1) if "checkpoints" in change]
        return [i for i in range(at[0], len(self.changes) + 1) if "events.jsonl" not in self.changes[i - 1]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, runners: list[Runner]) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(
        folder, tiny_llama, train__steps=STEPS, train__warmup=2, save__every=1, data__valid=0.2, eval__every=2
    )
    record = folder / "changes"
    assert runners[0].run(Job(str(recipe), str(folder / "run"), record=str(record))) == (0, "")
    began = time.perf_counter()
    assert runners[0].run(Job(str(recipe), str(folder / "again"))) == (0, "")
    assert digest(folder / "again") == digest(folder / "run")
    return Straight(recipe, folder / "run", time.perf_counter() - began, record.read_text().splitlines())


def digest(run: Path) -> str:
    """SHA-256 of the adapter."""
    return hashlib.sha256((run / "adapters.safetensors").read_bytes()).hexdigest()


def has_begun(run: Path) -> bool:
    return (run / "recipe.yaml").exists()


def resume(runner: Runner, straight: Straight, run: Path) -> None:
    """Go on after a kill, and see that nothing is missing."""
    assert runner.run(Job(str(straight.recipe), str(run), resume=has_begun(run))) == (0, "")
    assert digest(run) == digest(straight.out)
    assert (run / "adapter_config.json").read_bytes() == (straight.out / "adapter_config.json").read_bytes()
    told = [[(s["step"], s["loss"]) for s in events(r, "step")] for r in (run, straight.out)]
    assert told[0] == told[1]
    left = {p.relative_to(run) for p in run.rglob("*")}
    assert left == {p.relative_to(straight.out) for p in straight.out.rglob("*")}


def trial(runner: Runner, straight: Straight, run: Path, number: int) -> bool:
    """Kill a run, in two of five trials the resumed run too; whether a kill fell into a save at a chosen place."""
    dice = random.Random(number)
    at_a_place = number % 2 == 0
    codes = []
    for attempt in range(1 + (number % 5 < 2)):
        job = Job(str(straight.recipe), str(run), resume=has_begun(run))
        if at_a_place:  # a resumed run changes less
            job = replace(job, kill_at=dice.randrange(1, 60) if attempt else dice.choice(straight.in_saves))
        else:
            job = replace(job, kill_after=dice.uniform(0.05, 1.1 * straight.seconds))
        code, said = runner.run(job)
        assert code in (-signal.SIGKILL, 0), said
        codes.append(code)
    resume(runner, straight, run)
    return at_a_place and codes[0] == -signal.SIGKILL


def trials(runners: list[Runner], straight: Straight, folder: Path, count: int) -> int:
    """How many of the runs were killed at a chosen place inside a save; all of them ended as they should."""

    def half(which: int) -> int:
        return sum(trial(runners[which], straight, folder / str(n), n) for n in range(count) if n // 2 % 2 == which)

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(half, range(2)))


def test_40_runs_killed_at_any_moment_go_on_to_the_same_bits(
    runners: list[Runner], straight: Straight, tmp_path: Path
) -> None:
    assert trials(runners, straight, tmp_path, 40) >= 10


@pytest.mark.long
def test_200_runs_killed_at_any_moment_go_on_to_the_same_bits(
    runners: list[Runner], straight: Straight, tmp_path: Path
) -> None:
    assert trials(runners, straight, tmp_path, 200) >= 50


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapters.safetensors", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_more(
    runners: list[Runner], straight: Straight, tmp_path: Path, name: str, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight.out, run)
    file = run / "checkpoints" / f"step-{STEPS:07d}" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    (run / "adapters.safetensors").unlink()  # the run's own adapter comes from the checkpoint
    resume(runners[0], straight, run)
    starts = [e["step"] for e in events(run, "start")]
    told = [e["message"] for e in events(run, "note") if "damaged" in e["message"]]
    assert starts == [0, STEPS - 1]
    assert len(told) == 1
    assert f"step-{STEPS:07d}" in told[0]
    assert ("is missing" in told[0]) == (damage == "delete")


def test_without_a_whole_checkpoint_the_run_is_refused_and_left_as_it_is(
    runners: list[Runner], straight: Straight, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight.out, run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    before = saved(run)
    code, said = runners[0].run(Job(str(straight.recipe), str(run), resume=True))
    assert code == 3
    assert all(f"step-{step:07d} is damaged" in said for step in (STEPS, STEPS - 1))
    assert saved(run) == before


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_the_adapter_of_a_finished_run_is_restored(
    runners: list[Runner], straight: Straight, tmp_path: Path, damage: bytes | None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight.out, run)
    if damage is None:
        (run / "adapter_config.json").unlink()
    else:
        (run / "adapters.safetensors").write_bytes(damage)
    resume(runners[0], straight, run)


# --- a full disk -----------------------------------------------------------------------------------------------------


def saved(run: Path) -> dict[str, bytes]:
    """What counts of a run: its adapter and its checkpoints."""
    files = [*run.glob("adapter*"), *run.glob("checkpoints/**/*.*")]
    return {str(p.relative_to(run)): p.read_bytes() for p in files if p.is_file()}


@pytest.fixture(scope="module")
def halfway(runners: list[Runner], straight: Straight, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, killed while it saved its fourth step."""
    run = tmp_path_factory.mktemp("halfway") / "run"
    place = next(i for i, change in enumerate(straight.changes, 1) if ".step-0000004.partial" in change)
    assert runners[0].run(Job(str(straight.recipe), str(run), kill_at=place))[0] == -signal.SIGKILL
    return run


LADDER = [0, 1, 50, 200, 500, 1000, 2000, "adapter", "state"]


@pytest.mark.parametrize("limit", LADDER)
def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_saved(
    runners: list[Runner], straight: Straight, halfway: Path, tmp_path: Path, limit: int | str
) -> None:
    """RLIMIT_FSIZE stops every write at a number of bytes: in the events, in a small file, in the tensors."""
    run = tmp_path / "run"
    shutil.copytree(halfway, run)
    newest = halfway / "checkpoints" / "step-0000003"
    names = {"adapter": "adapters.safetensors", "state": "state.safetensors"}
    most = limit if isinstance(limit, int) else (newest / names[limit]).stat().st_size - 1
    code, said = runners[0].run(Job(str(straight.recipe), str(run), resume=True, file_limit=most))
    assert code == 4, said
    assert said.endswith("cannot be written (File too large)")
    assert "\n" not in said
    assert saved(run) == {name: data for name, data in saved(halfway).items() if ".partial" not in name}
    assert not list(run.rglob("*.partial"))
    resume(runners[0], straight, run)


@pytest.mark.parametrize("more", [0, 1, 300, 900])
def test_a_disk_that_is_full_in_the_middle_of_an_event_costs_nothing_that_was_saved(
    runners: list[Runner], straight: Straight, halfway: Path, tmp_path: Path, more: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(halfway, run)
    RunFolder(run).append(Noted("x" * 100_000))  # so that the events are the first to be too large
    most = (run / "events.jsonl").stat().st_size + more
    code, said = runners[0].run(Job(str(straight.recipe), str(run), resume=True, file_limit=most))
    assert (code, said) == (4, f"{run}/events.jsonl: cannot be written (File too large)")
    resume(runners[0], straight, run)

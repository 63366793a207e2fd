"""Training in a process of its own: what reaches the person, what a death costs, and who outlives whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mlxsft.cli import call
from mlxsft.errors import InputRefused, OutOfResources
from mlxsft.interrupt import Stop
from mlxsft.recipe import load_recipe
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.deaths import Death, cause_of_death
from mlxsft.training.events import Noted, Restarted, Saved, Stepped
from mlxsft.training.power import awake, awake_command, plugged_in
from mlxsft.training.run import run_training
from mlxsft.training.supervisor import Launch, Supervisor, WorkerFailed
from mlxsft.training.worker import GPU_VARIABLES, Job, calm_the_gpu
from tests.training.test_run import events, lines_until, same_adapter, start, train, workers, write_recipe, write_rows

SMALL = {"train__steps": 12, "save__every": 4}


@pytest.fixture
def straight(tmp_path: Path, tiny_llama: Path) -> Path:
    """The run that nothing happens to."""
    assert train(write_recipe(tmp_path, tiny_llama, **SMALL), tmp_path / "straight") == 0
    return tmp_path / "straight"


def test_the_process_that_watches_loads_no_model_library() -> None:
    code = "import sys, mlxsft.cli.train, mlxsft.training.supervisor, mlxsft.training.report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mlx", "mlx_lm", "torch", "transformers"} & set(loaded)


def test_a_job_crosses_to_its_process_as_it_is(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny_llama, eval__samples=["hé\nllo"], adapter__targets=["q_proj"]))
    job = Job(recipe, tmp_path / "run", "mlx", resume=True, restarted=Restarted(4, "memory ran out", 2, 48))
    assert Job.from_json(job.to_json()) == job
    assert "\n" not in job.to_json()


def test_refusals_of_the_worker_reach_the_person_as_they_are(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    (tmp_path / "rows.jsonl").write_text("not json\n")
    assert train(recipe, tmp_path / "run") == 3
    expected = capsys.readouterr().err
    assert call(["train", str(recipe), "--out", str(tmp_path / "run")]) == 3
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()


def supervised(tmp_path: Path, model: Path, *codes: str) -> list[object]:
    """What a supervisor makes of processes, by rank, that run this code instead of training."""
    job = Job(load_recipe(write_recipe(tmp_path, model)), tmp_path / "run", "auto")
    launches = [Launch([sys.executable, "-c", code], os.environ) for code in codes]
    return list(Supervisor(job, lambda: launches, restarts=3, stop=Stop(), tell=print).events())


def test_a_bug_in_the_worker_keeps_its_traceback(tmp_path: Path, tiny_llama: Path) -> None:
    code = """import json, sys; print(json.dumps({"bug": "Traceback …\\nTypeError: 'x'"})); sys.exit(1)"""
    with pytest.raises(WorkerFailed, match="TypeError: 'x'"):
        supervised(tmp_path, tiny_llama, code)


def test_a_worker_that_dies_before_it_began_is_not_started_again(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(OutOfResources, match=r"died before training began: it ended with exit code 3"):
        supervised(tmp_path, tiny_llama, "import sys; sys.exit(3)")


def test_the_rank_that_failed_is_told_and_not_those_that_miss_it(tmp_path: Path, tiny_llama: Path) -> None:
    missing = "raise RuntimeError('[ring] connection to a peer was lost')"
    failed = 'import time; time.sleep(1); print(\'{"error": "InputRefused", "message": "m", "hint": null}\')'
    with pytest.raises(InputRefused, match="m"):
        supervised(tmp_path, tiny_llama, missing, failed)
    with pytest.raises(OutOfResources, match="another rank of the run is gone"):
        supervised(tmp_path, tiny_llama, missing, missing)


def test_a_line_that_a_kill_cut_off_is_no_bug(tmp_path: Path, tiny_llama: Path) -> None:
    code = """import os; print('{"event": "st', end="", flush=True); os.kill(os.getpid(), 9)"""
    with pytest.raises(OutOfResources, match="SIGKILL"):
        supervised(tmp_path, tiny_llama, code)


# --- deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "last", "kind"),
    [
        (-signal.SIGKILL, "", "memory"),
        (-signal.SIGABRT, "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU…)", "memory"),
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", "memory"),
        (1, "RuntimeError: [metal::malloc] Resource limit (499000) exceeded.", "memory"),
        (1, "RuntimeError: [malloc] Unable to allocate 4398046511104 bytes.", "memory"),
        (1, "MemoryError", "memory"),
        (127, "cannot allocate memory for thread-local data: ABORT", "memory"),  # glibc's loader
        (
            1,
            "RuntimeError: [METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:k…)",
            "watchdog",
        ),
        (-signal.SIGABRT, "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:k…)", "watchdog"),
        (
            -signal.SIGABRT,
            "[METAL] … failed: Internal Error (0000000e:Internal Error)",
            "watchdog",
        ),
        (1, "RuntimeError: [ring] connection to a peer was lost", "lost rank"),
        (-signal.SIGSEGV, "", "crash"),
        (-signal.SIGABRT, "Assertion failed", "crash"),
        (3, "", "crash"),
    ],
)
def test_deaths_are_told_apart(status: int, last: str, kind: str) -> None:
    death = cause_of_death(status, f"something before\n{last}\n")
    assert death is not None
    assert death.kind == kind
    assert death.smaller_helps == (kind in ("memory", "watchdog"))


def test_the_last_words_of_an_unknown_end_are_told() -> None:
    assert cause_of_death(127, "before\nsymbol lookup error: libx.so\n") == Death(
        "crash", "it ended with exit code 127; its last line was: symbol lookup error: libx.so"
    )
    assert cause_of_death(3, "") == Death("crash", "it ended with exit code 3 and gave no reason")


def test_a_bug_is_no_death() -> None:
    assert cause_of_death(1, "TypeError: unsupported operand") is None
    assert cause_of_death(-signal.SIGABRT, "") == Death("crash", "it crashed (SIGABRT)")


@pytest.mark.parametrize(("number", "tokens"), [(signal.SIGKILL, 48), (signal.SIGSEGV, 96)])
def test_a_worker_that_dies_is_replaced_and_the_run_ends_as_if_it_had_not(
    tmp_path: Path, straight: Path, number: signal.Signals, tokens: int
) -> None:
    """Bit for bit where the micro-batches stay as they are, which a crash leaves and a lack of memory halves."""
    process = start(tmp_path / "recipe.yaml", tmp_path / "run")
    list(lines_until(process, "step", 6))
    workers(process)[0].send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    run = tmp_path / "run"
    (restart,) = events(run, "restart")
    assert (restart["step"], restart["restart"], restart["micro_batch_tokens"]) == (4, 1, tokens)
    assert f"The training process died: {restart['cause']}. Starting another one." in said
    assert number.name in restart["cause"]
    assert [s["step"] for s in events(run, "step")] == list(range(1, 13))  # no step is told twice
    assert (run / "recipe.yaml").read_bytes() == (straight / "recipe.yaml").read_bytes()
    losses = [[s["loss"] for s in events(r, "step")] for r in (run, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if tokens == 96:
        assert same_adapter(run, straight)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes RLIMIT_AS and does not hold to it")
def test_a_worker_without_memory_is_replaced_by_one_with_smaller_micro_batches(
    tmp_path: Path, tiny_llama: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_llama,
        data__max_tokens=512,
        data__valid=str(tmp_path / "valid.jsonl"),
        train__steps=1,
        train__batch_size=288,
        train__micro_batch_tokens=288 * 512,
    )
    write_rows(tmp_path / "valid.jsonl")
    write_rows(tmp_path / "rows.jsonl", [(f"Who are you, {i}?", "I am Pip. " * 45) for i in range(288)])
    process = start(recipe, tmp_path / "run")
    list(lines_until(process, "eval", 0))  # OpenBLAS has its buffers now; it would look for them for ever
    worker = workers(process)[0]
    worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms + (8 << 20),) * 2)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("The training process died: ") == 1
    (restart,) = events(tmp_path / "run", "restart")
    assert "memory" in restart["cause"]
    assert restart["micro_batch_tokens"] <= 288 * 512
    assert [s["step"] for s in events(tmp_path / "run", "step")] == [1]


def test_a_worker_that_dies_too_often_is_given_up_with_the_command_to_go_on(
    tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(tmp_path / "recipe.yaml", tmp_path / "run", "--restarts", "1")
    for kind, step in (("step", 2), ("restart", 0)):  # the second dies before any checkpoint too
        list(lines_until(process, kind, step))
        workers(process)[0].kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 4
    assert said.count("Error: ") == 1
    assert "Traceback" not in said
    go_on = said[said.index("mlxsft train") :].split()
    assert go_on[-1] == "train.micro_batch_tokens=48"
    assert train(tmp_path / "run" / "recipe.yaml", tmp_path / "run", go_on[-1], resume=True) == 0
    assert [s["step"] for s in events(tmp_path / "run", "step")] == list(range(1, 13))


def test_a_run_without_its_parent_saves_and_stops(tmp_path: Path, straight: Path) -> None:
    process = start(tmp_path / "recipe.yaml", tmp_path / "run", "--set", "train.steps=2000", "--set", "save.every=2000")
    list(lines_until(process, "step", 3))
    (worker,) = workers(process)
    process.kill()
    process.communicate()
    worker.wait(60)
    (end,) = events(tmp_path / "run", "end")
    assert end["reason"] == "interrupted"
    assert 3 <= end["step"] < 2000
    assert RunFolder(tmp_path / "run").newest()[0].progress.step == end["step"]  # type: ignore[union-attr]  # is there


def test_a_second_interrupt_stops_at_once_and_leaves_no_process(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__steps=2000)
    process = start(recipe, tmp_path / "run")
    list(lines_until(process, "step", 3))
    (worker,) = workers(process)
    worker.suspend()  # a step that takes for ever
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "Once more stops at once" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped at once; what was trained since the last checkpoint is lost." in said
    assert "Traceback" not in said
    assert said.rstrip().endswith(f"--out {tmp_path / 'run'} --resume")
    assert not psutil.pid_exists(worker.pid)


def test_a_macs_gpu_gets_little_at_once_unless_the_person_has_said_otherwise() -> None:
    here = {"MLX_MAX_OPS_PER_BUFFER": "50"}
    calm_the_gpu("linux", here)
    assert here == {"MLX_MAX_OPS_PER_BUFFER": "50"}
    calm_the_gpu("darwin", here)
    assert here == {**GPU_VARIABLES, "MLX_MAX_OPS_PER_BUFFER": "50"}


def test_mlx_and_the_gpu_are_not_touched_before_these_variables_are_set() -> None:
    code = "import sys, mlxsft.training.worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mlx", "mlx.core", "mlx_lm", "transformers"} & set(loaded)


# --- power -----------------------------------------------------------------------------------------------------------


def test_only_a_mac_is_kept_awake_and_only_while_the_process_lives() -> None:
    assert awake_command("darwin", 42) == ["/usr/bin/caffeinate", "-ims", "-w", "42"]
    assert awake_command("linux", 42) is None


def test_what_keeps_a_mac_awake_ends_with_the_run() -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    with awake(sleeping):
        (child,) = [c for c in psutil.Process().children() if c.cmdline() == sleeping]
    assert not child.is_running()
    with awake(None), awake(["/nothing/here"]):  # a system without it
        pass


@pytest.mark.parametrize(("battery", "plugged"), [(None, True), (True, True), (False, False), ("none", True)])
def test_only_a_battery_that_says_so_is_without_mains(
    monkeypatch: pytest.MonkeyPatch, battery: bool | str | None, plugged: bool
) -> None:
    reading = None if battery == "none" else SimpleNamespace(power_plugged=battery)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: reading, raising=False)
    assert plugged_in() == plugged


def on_battery(readings: list[bool], asked: list[bool], tmp_path: Path, model: Path) -> Iterator[object]:
    """A run of four steps whose battery gives these readings, then says that it is plugged in."""
    return run_training(
        load_recipe(write_recipe(tmp_path, model, train__steps=4, save__every=4)),
        RunFolder(tmp_path / "run"),
        backend_name="auto",
        resume=False,
        force=False,
        stop=lambda: bool(asked),
        tell=print,
        plugged_in=lambda: readings.pop(0) if readings else True,
    )


def test_without_mains_the_next_step_waits_and_what_was_trained_is_saved(tmp_path: Path, tiny_llama: Path) -> None:
    told = [e for e in on_battery([True, True, False, False], [], tmp_path, tiny_llama) if not isinstance(e, Saved)]
    kinds = [e.message if isinstance(e, Noted) else e.step for e in told if isinstance(e, (Noted, Stepped))]
    waiting = [k for k in kinds if isinstance(k, str) and ("battery" in k or "plugged" in k)]
    assert waiting == [
        "on battery after step 2: waiting until the machine is plugged in",
        "plugged in again: going on",
    ]
    assert [k for k in kinds if isinstance(k, int)] == [1, 2, 3, 4]
    assert kinds.index(waiting[0]) == kinds.index(2) + 1
    assert [json.loads(line)["step"] for line in saved_lines(tmp_path / "run")] == [0, 2, 4]


def saved_lines(run: Path) -> list[str]:
    return [line for line in (run / "events.jsonl").read_text().splitlines() if '"save"' in line]


def test_a_run_that_waits_for_power_can_be_stopped(tmp_path: Path, tiny_llama: Path) -> None:
    asked: list[bool] = []
    for event in on_battery([True, False] + [False] * 10_000, asked, tmp_path, tiny_llama):
        if isinstance(event, Noted) and "on battery" in event.message:
            asked.append(True)
    (end,) = events(tmp_path / "run", "end")
    assert (end["reason"], end["step"]) == ("interrupted", 1)

"""Benchmarks of the field, run by EleutherAI's lm-eval on the model in memory."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxsft.backends import Backend
from mlxsft.data.render import Renderer
from mlxsft.errors import UsageError
from mlxsft.evaluation.measure import Watch, unwatched

Task = str | dict[str, Any]  # a name that lm-eval knows, or a task of its YAML files
Scores = Mapping[tuple[str, str], tuple[float, float | None]]  # (task, metric) → value and standard error


@dataclass(frozen=True)
class Benchmark:
    """A metric of a task, as lm-eval names them, before and after, with its standard errors."""

    task: str
    metric: str
    base: float
    tuned: float
    base_error: float | None
    tuned_error: float | None


def refuse_without_lm_eval() -> None:
    """Raises UsageError with the install command where lm-eval is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "--benchmark needs lm-eval, not installed here", "Install it: pip install 'mlxsft[benchmarks]'"
        )


def scores(
    backend: Backend, renderer: Renderer, tasks: Sequence[Task], *, limit: int, seed: int, watch: Watch = unwatched
) -> Scores:
    """What lm-eval finds for the adapter in use, on at most `limit` rows of each task.

    lm-eval loads the tasks' rows from the Hub where they are not here yet. Raises UsageError for a task that it does
    not know or whose rows cannot be had.
    """
    refuse_without_lm_eval()
    import lm_eval

    from mlxsft.evaluation.lm_eval_model import BackendModel

    state = random.getstate()  # which lm-eval seeds
    try:
        found = lm_eval.simple_evaluate(
            model=BackendModel(backend, renderer, watch),
            tasks=list(tasks),
            limit=limit,
            bootstrap_iters=100,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=None,
            fewshot_random_seed=seed,
        )
    except (KeyError, ValueError, OSError) as error:
        raise UsageError(
            f"--benchmark: lm-eval says: {str(error).splitlines()[0]}", "`lm-eval ls tasks` lists them."
        ) from error
    finally:
        random.setstate(state)
    return dict(_flat(found["results"]))


def side_by_side(base: Scores, tuned: Scores) -> list[Benchmark]:
    """The metrics that both models have."""
    return [
        Benchmark(*name, base[name][0], tuned[name][0], base[name][1], tuned[name][1]) for name in base if name in tuned
    ]


def _flat(results: Mapping[str, Mapping[str, Any]]) -> Any:
    """Of lm-eval's {task: {"acc,none": 0.5, "acc_stderr,none": 0.1}}, each value with its error."""
    for task, values in results.items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{kind}")
                shown = name if kind == "none" else f"{name} ({kind})"
                yield (task, shown), (_rounded(value), _rounded(error) if isinstance(error, float) else None)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

"""mlx-lm's `lora_config.yaml` → a recipe that trains the same thing, or the reasons why there is none.

Keys and defaults are those of `mlx_lm/lora.py` 0.32.2, the schedules those of `mlx/optimizers/schedulers.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlxsft.recipe import checked
from mlxsft.recipe_file import KeyPath, Place, Sheet, printable, read_sheet, shown, to_yaml

DEFAULTS: dict[str, Any] = {
    "model": "Qwen/Qwen3-0.6b",
    "train": False,
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "optimizer_config": {"adam": {}, "adamw": {}, "muon": {}, "sgd": {}, "adafactor": {}},
    "data": "mlx-community/WikiSQL",
    "seed": 0,
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": 1e-5,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "save_every": 100,
    "test": False,
    "test_batches": 500,
    "max_seq_length": 2048,
    "config": None,
    "grad_checkpoint": False,
    "grad_accumulation_steps": 1,
    "clear_cache_threshold": 0,
    "lr_schedule": None,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
    "mask_prompt": False,
    "report_to": None,
    "project_name": None,
    "trust_remote_code": False,
}

_WITHOUT_COUNTERPART = {
    "adapter_path": "the run folder is named on the command line, mlxsft train RECIPE --out RUN",
    "clear_cache_threshold": "not carried over; train.cache_limit says how much freed memory is kept, in GiB",
    "project_name": "not carried over; a run's events are in its events.jsonl",
    "report_to": "not carried over; a run's events are in its events.jsonl",
    "steps_per_report": "every step is reported",
    "test": "not carried over; test.jsonl is not read by a run",
    "val_batches": "validation reads all held-out rows, every time",
}
_NOT_TAKEN = {
    "hf_dataset": "not carried over; in a recipe it is data.train: hf://PATH:SPLIT, and data.columns for its features",
    "resume_adapter_file": "a run cannot start from an adapter; leave this out",
    "trust_remote_code": "code from a checkpoint never runs here; leave this out",
}
_SILENT = {"train", "config", "test_batches"}  # nothing is lost without them
_OPTIMIZERS = {
    "adam": ("betas", "eps", "bias_correction"),
    "adamw": ("betas", "eps", "bias_correction", "weight_decay"),
    "sgd": ("momentum", "weight_decay"),
}
_COLUMNS = {  # mlx-lm looks these names up at the top of the file, though it does not list them
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "messages",
    "text_feature": "text",
}


def import_mlx_lm(path: Path, *, cwd: Path | None = None) -> tuple[str, list[str]]:
    """The recipe for one of mlx-lm's configuration files, as YAML with comments, and notes on what differs.

    Model and data are looked for from `cwd`, as mlx-lm does. UsageError lists everything that cannot be carried over.
    """
    importer = _Importer(read_sheet(path), Path.cwd() if cwd is None else cwd)
    importer.run()
    return importer.text(path.name), importer.notes


class _Importer:
    """One import under way: what was given, the recipe so far, the notes."""

    def __init__(self, given: Sheet, cwd: Path) -> None:
        self.given = given
        self.cwd = cwd
        self._notes: list[tuple[int, str]] = []
        root = given.place(())
        self.recipe = Sheet(Place(root.label, cwd, 0))
        self.recipe.problems = given.problems  # one list: what mlx-lm's file has wrong and what a recipe cannot take
        self.comments: dict[KeyPath, str] = {}

    def run(self) -> None:
        """Carry everything over; UsageError if anything cannot be."""
        self.sort_out_keys()
        self.model()
        self.data()
        self.adapter()
        self.length()
        self.optimizer()
        self.rate()
        self.put("train.seed", self.get("seed"), "seed")
        self.put("train.checkpoint_activations", self.flag("grad_checkpoint"), "grad_checkpoint")
        checked(self.recipe)

    # What is given ---------------------------------------------------------------------------------------------------

    def get(self, *path: str) -> Any:
        """The value at a path in mlx-lm's file, or mlx-lm's default where it is absent or null."""
        for source in (self.given.values, DEFAULTS):
            value: Any = source
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                return value
        return None

    def whole(self, *path: str, least: int | None = None) -> int | None:
        """A whole number, at least `least`; anything else is a problem and None."""
        value = self.get(*path)
        if isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least):
            return value
        self.refuse(path, f"got {shown(value)}, expected a whole number" + ("" if least is None else f" ≥ {least}"))
        return None

    def flag(self, key: str) -> Any:
        """A truth value; mlx-lm reads the words of YAML 1.1."""
        value = self.get(key)
        words = {"yes": True, "on": True, "no": False, "off": False}
        return words.get(value.lower(), value) if isinstance(value, str) else value

    def refuse(self, path: KeyPath, sentence: str) -> None:
        self.given.complain(path, sentence)

    def note(self, path: KeyPath, sentence: str) -> None:
        place = self.given.place(path)
        self._notes.append((place.rank, place.says(path, sentence)))

    @property
    def notes(self) -> list[str]:
        """What a run of the recipe does differently, in the order of the file."""
        return [note for _, note in sorted(self._notes, key=lambda note: note[0])]

    # What is made ----------------------------------------------------------------------------------------------------

    def put(self, setting: str, value: Any, *source: str, comment: str = "") -> None:
        """Set a value of the recipe; a problem with it will be reported at the line of its source."""
        path = tuple(setting.split("."))
        section = self.recipe.values
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section[path[-1]] = value
        self.recipe.places[path] = self.given.place(source)
        if comment:
            self.comments[path] = comment

    def text(self, name: str) -> str:
        """The recipe as YAML, with the notes and what became of the numbers as comments."""
        lines = [f"# Imported from mlx-lm's {printable(name)}."]
        lines += [f"# - {note}" for note in self.notes]
        for key, value in self.recipe.values.items():
            if not isinstance(value, dict):
                lines.append(to_yaml({str(key): value}).rstrip("\n"))
                continue
            lines.append(f"{key}:")
            for inner, setting in value.items():
                comment = self.comments.get((key, inner))
                lines += [f"  # {comment}"] if comment else []
                lines += ["  " + line for line in to_yaml({str(inner): setting}).splitlines()]
        return "\n".join(lines) + "\n"

    # The parts -------------------------------------------------------------------------------------------------------

    def sort_out_keys(self) -> None:
        """Note or refuse every key that has no place in a recipe."""
        for key, value in self.given.values.items():
            path = (key,)
            off = value in (None, False, 0, "") or (isinstance(value, str) and value.lower() in ("no", "off"))
            if key in _COLUMNS:
                if value not in (None, _COLUMNS[str(key)]):
                    self.refuse(path, f"got {shown(value)}; rename the column to {_COLUMNS[str(key)]}")
            elif key in _NOT_TAKEN and not off:
                self.refuse(path, _NOT_TAKEN[str(key)])
            elif key in _WITHOUT_COUNTERPART and not off:
                self.note(path, _WITHOUT_COUNTERPART[str(key)])
            elif key not in DEFAULTS and key not in _NOT_TAKEN:
                self.refuse(path, "mlx-lm 0.32.2 has no such key")

    def model(self) -> None:
        model = self.get("model")
        if isinstance(model, str):
            if self.given.values.get("model") is None:
                self.note(("model",), f"not in the file; {model} is mlx-lm's default")
            if model.startswith(".") or os.path.exists(self.cwd / model):
                model = os.path.abspath(self.cwd / model)
            elif model.count("/") != 1:
                self.note(("model",), f"no folder {shown(model)} here; it is taken for a model of the Hub")
        self.put("model", model, "model")

    def data(self) -> None:
        self.data_files()
        self.put("data.max_tokens", self.get("max_seq_length"), "max_seq_length")
        self.put("data.too_long", "keep-response", "max_seq_length")
        self.note(("max_seq_length",), "a longer row loses the beginning of its prompt; mlx-lm cuts off its end")
        masked = self.flag("mask_prompt")
        train_on = {True: "responses", False: "all"}.get(masked) if isinstance(masked, bool) else masked
        self.put("data.train_on", train_on, "mask_prompt", comment=f"mask_prompt: {shown(masked)}")

    def data_files(self) -> None:
        """Where mlx-lm would find train.jsonl and valid.jsonl; names of Hub data sets are refused."""
        data = self.get("data")
        self.put("data.train", "train.jsonl", "data")  # stands in while other problems are looked for
        if self.given.values.get("hf_dataset"):
            return
        if self.given.values.get("data") is None:
            return self.refuse(("data",), f"not in the file, and {data}, mlx-lm's default, would come from the Hub")
        if not isinstance(data, str):
            return self.refuse(("data",), f"got {shown(data)}, expected a folder with train.jsonl")
        folder = Path(os.path.abspath(self.cwd / data))
        if not folder.exists() and not os.path.isabs(data):
            return self.refuse(
                ("data",),
                f"no folder {shown(data)} here, so mlx-lm would look for a data set of the Hub, which in a recipe is "
                f"data.train: hf://{data}; or import from the folder where mlx_lm.lora ran",
            )
        if folder.exists() and not (folder / "train.jsonl").is_file():
            return self.refuse(("data",), f"{shown(data)} has no train.jsonl")
        if not folder.exists():
            self.note(("data",), f"there is no {shown(data)} on this machine")
        self.put("data.train", str(folder / "train.jsonl"), "data")
        valid = folder / "valid.jsonl"
        if valid.is_file():
            return self.put("data.valid", str(valid), "data")
        self.note(("data",), "no valid.jsonl there, so nothing is held out; data.valid: 0.05 would hold out 5 %")
        self.put("data.valid", None, "data")

    def adapter(self) -> None:
        self.put("adapter.kind", self.get("fine_tune_type"), "fine_tune_type")
        layers = self.whole("num_layers")
        if layers is not None:
            self.put("adapter.layers", layers if layers > 0 else "all", "num_layers")
        if self.get("fine_tune_type") != "full":
            self.low_rank()

    def low_rank(self) -> None:
        given = self.given.values.get("lora_parameters")
        if given is not None and not isinstance(given, dict):
            return self.refuse(("lora_parameters",), f"got {shown(given)}, expected rank, scale and dropout")
        for key in given or ():
            if key not in ("rank", "scale", "dropout", "keys"):
                hint = "; mlx-lm has scale = alpha ÷ rank in its place" if key == "alpha" else ""
                self.refuse(("lora_parameters", key), f"mlx-lm has no such key{hint}")
        for key in ("rank", "scale", "dropout"):
            if given is not None and given.get(key) is None:
                self.refuse(("lora_parameters", key), "missing; mlx-lm refuses the file too")
        rank, scale = self.whole("lora_parameters", "rank", least=1), self.get("lora_parameters", "scale")
        if rank is not None:
            self.put("adapter.rank", rank, "lora_parameters", "rank")
            number = isinstance(scale, int | float) and not isinstance(scale, bool)
            alpha = float(scale * rank) if number else scale  # what is no number is refused with the rest
            self.put("adapter.alpha", alpha, "lora_parameters", "scale", comment=f"scale {shown(scale)} × rank {rank}")
        self.put("adapter.dropout", self.get("lora_parameters", "dropout"), "lora_parameters", "dropout")
        keys = self.get("lora_parameters", "keys")
        self.put("adapter.targets", "all-linear" if keys is None else keys, "lora_parameters", "keys")

    def length(self) -> None:
        """Steps and rows a step: mlx-lm counts micro-batches, a recipe counts updates."""
        parts = self.whole("grad_accumulation_steps", least=1)
        rows = self.whole("batch_size", least=1)
        if parts is None or rows is None:
            return
        if parts > 1:
            self.note(("grad_accumulation_steps",), f"{parts} iterations of mlx-lm are one step: one update")
        self.put("train.batch_size", rows * parts, "batch_size", comment=_times("batch_size", rows, "×", parts))
        settings = {"iters": "train.steps", "steps_per_eval": "eval.every", "save_every": "save.every"}
        for key, setting in settings.items():
            count = self.whole(key, least=parts if key == "iters" else 1)
            if count is not None:
                self.put(setting, max(1, count // parts), key, comment=_times(key, count, "÷", parts))
        self.note(("save_every",), "mlx-lm keeps every adapter it saves, a run the newest save.keep: 2")

    def optimizer(self) -> None:
        name = str(self.get("optimizer")).lower()
        if name not in _OPTIMIZERS:
            reason = "muon and adafactor of mlx give a learning rate another meaning"
            return self.refuse(("optimizer",), f"got {shown(name)}; adam, adamw and sgd are carried over, {reason}")
        where = ("optimizer_config", name)
        configs = self.get("optimizer_config")
        config = (configs.get(name) or {}) if isinstance(configs, dict) else configs
        if not isinstance(config, dict):
            return self.refuse(where, f"got {shown(config)}, expected settings of {name}")
        for key in config:
            if key not in _OPTIMIZERS[name]:
                self.refuse((*where, key), f"not carried over; {name} has {', '.join(_OPTIMIZERS[name])}")
        self.put("train.clip_norm", None, "optimizer", comment="mlx-lm does not clip")
        if name != "sgd":
            return self.adam(name, config, where)
        self.put("train.optimizer", "sgd", "optimizer")
        self.put("train.momentum", config.get("momentum", 0.0), *where, "momentum")
        self.put("train.weight_decay", config.get("weight_decay", 0.0), *where, "weight_decay")

    def adam(self, name: str, config: dict[str, Any], where: tuple[str, ...]) -> None:
        betas = config.get("betas", [0.9, 0.999])
        if not isinstance(betas, list) or len(betas) != 2:
            return self.refuse((*where, "betas"), f"got {shown(betas)}, expected two numbers")
        if not config.get("bias_correction"):
            self.note(
                ("optimizer",), f"{name} of mlx does not correct the bias of its first steps; here it is corrected"
            )
        if config.get("eps", 1e-8) != 1e-8:
            self.note((*where, "eps"), f"got {shown(config['eps'])}, and it is always 1e-8 here")
        decay = config.get("weight_decay", 0.01) if name == "adamw" else 0.0
        self.put("train.optimizer", "adamw", "optimizer")
        self.put("train.beta1", betas[0], *where, "betas")
        self.put("train.beta2", betas[1], *where, "betas")
        self.put("train.weight_decay", decay, *where, "weight_decay")

    def rate(self) -> None:
        """The learning rate and how it changes; with a schedule mlx-lm does not look at learning_rate."""
        schedule = self.get("lr_schedule")
        if not schedule:
            self.put("train.learning_rate", self.get("learning_rate"), "learning_rate")
            self.put("train.schedule", "constant", "lr_schedule")
            return self.put("train.warmup", 0, "lr_schedule")
        if not isinstance(schedule, dict):
            return self.refuse(("lr_schedule",), f"got {shown(schedule)}, expected name and arguments")
        for key in schedule:
            if key not in ("name", "arguments", "warmup", "warmup_init"):
                self.refuse(("lr_schedule", key), "mlx-lm has no such key")
        name, arguments = schedule.get("name"), schedule.get("arguments")
        if name not in ("cosine_decay", "linear_schedule"):
            what = f"got {shown(name)}, and only cosine_decay and linear_schedule are here"
            return self.refuse(("lr_schedule", "name"), f"{what}; without lr_schedule the rate is constant")
        cosine = name == "cosine_decay"
        if not isinstance(arguments, list) or len(arguments) not in ((2, 3) if cosine else (3,)):
            names = "[start, steps, end]" if cosine else "[start, end, steps]"
            return self.refuse(("lr_schedule", "arguments"), f"got {shown(arguments)}, expected {names}")
        start, steps, end = (*arguments, 0.0)[:3] if cosine else (arguments[0], arguments[2], arguments[1])
        where = ("lr_schedule", "arguments")
        self.put("train.learning_rate", start, *where, comment="mlx-lm takes the rate from lr_schedule alone")
        self.put("train.schedule", "cosine" if cosine else "linear", "lr_schedule", "name")
        self.put("train.final_learning_rate", end, *where)
        if not isinstance(steps, int):
            return self.refuse(where, f"got {shown(steps)} for steps, expected a whole number")
        self.put("train.decay", steps, *where)
        warmup = 0 if schedule.get("warmup") is None else self.whole("lr_schedule", "warmup", least=0)
        if warmup is not None:
            self.put("train.warmup", warmup, "lr_schedule", "warmup")
        if schedule.get("warmup") and schedule.get("warmup_init"):
            self.note(("lr_schedule", "warmup_init"), "the warm-up starts at 0 here")


def _times(key: str, count: int, sign: str, parts: int) -> str:
    return f"{key} {count} {sign} grad_accumulation_steps {parts}" if parts > 1 else ""

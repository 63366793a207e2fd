"""What is wrong with a checkpoint folder, told from its names, its JSON files and its safetensors headers.

Every function here reads and refuses; none loads a weight. Messages begin with the file; the caller names the folder.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxsft.errors import InputRefused
from mlxsft.models.headers import TensorInfo, lfs_hint, some, unique

Json = dict[str, Any]

CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer*.model",
    "spiece.model",
    "sentencepiece*.model",
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
    "*.tiktoken",
    "tekken.json",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
BESIDE = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "hf_quant_config.json")
INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"  # mlx-lm loads every file of this name, whatever an index says
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl", ".pickle")

# Where architectures keep the input embedding; whole path components, so that `position_embedding` is not `embedding`.
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "embeddings",
    "embedding",
    "lm_head",  # a tied matrix may be stored under the head's name only
)
OTHER_MODALITIES = re.compile(r"vision|visual|image|audio|speech")

TOKENIZER_JSON_BYTES = 64 << 20  # the largest published ones have about 35 MB
OTHER_JSON_BYTES = 10 << 20
TEXT_GROWTH = 1000  # how many times as long a normalizer may make a text
COMMIT = re.compile(r"[0-9a-f]{40}")

NO_CODE_HINT = (
    "mlxsft never runs code from a checkpoint. If its architecture is built in, a copy of the folder "
    "without that key can be loaded."
)


class Incomplete(InputRefused):
    """A file is missing; from the Hub's cache this means that the download never finished."""


def listing(folder: Path) -> list[str]:
    """The names of the folder's files, sorted; of subfolders only the chat templates."""
    if (folder / "additional_chat_templates").is_symlink():
        raise InputRefused("additional_chat_templates: a link, where a folder was expected")
    try:
        found = [*os.listdir(folder), *(f"additional_chat_templates/{p.name}" for p in folder.glob(TEMPLATES[-1]))]
    except OSError as error:
        raise InputRefused(f"the folder cannot be read ({error.strerror})") from error
    return sorted(name for name in found if not (folder / name).is_dir())


def defines(name: str) -> bool:
    """Whether the file of this name makes the model what it is."""
    patterns = (*CONFIGS, *TOKENIZERS, *TEMPLATES, *BESIDE, INDEX, WEIGHTS)
    # A `*` matches slashes too: as many as the pattern has, so that no deeper folder and no `..` comes in.
    return "\\" not in name and any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)


def blobs(folder: Path) -> Path | None:
    """Where the symlinks of a Hub cache snapshot lead; None for any other folder."""
    beside = folder.parent.parent / "blobs"
    snapshot = folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) and beside.is_dir()
    return beside.resolve() if snapshot else None


# ---- what is refused ------------------------------------------------------------------------------------------------


def refuse_pickle_only(names: Collection[str]) -> None:
    """Weights as pickle, or none at all."""
    if any(name.endswith(".safetensors") for name in names):
        return
    if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
        raise InputRefused(
            f"the weights are stored as pickle only ({some(pickles)}), which can run code when it is loaded",
            "Look for a repository or a revision of the same model with .safetensors files.",
        )
    raise Incomplete(f"no weights: expected {WEIGHTS}, found {some(names) or 'nothing'}")


def read_configs(folder: Path, names: Collection[str]) -> dict[str, Json]:
    """{file: content} of the small JSON files that are there, free of code and of names that leave the folder."""
    refuse_links(folder, filter(defines, names))
    configs = {name: read_json(folder / name) for name in CONFIGS if name in names}
    for file, content in configs.items():
        _refuse_code(file, content)
    if "adapter_config.json" in names:
        whole = "config.json" in configs
        what = "beside config.json: transformers would load that adapter too" if whole else "an adapter, not a model"
        raise InputRefused(f"adapter_config.json: {what}", "Give the base model, and the adapter with --adapter.")
    if "config.json" not in configs:
        raise Incomplete("config.json is missing")
    model_type = configs["config.json"].get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w.-]+", model_type):
        raise InputRefused(f"config.json: model_type is {model_type!r}, expected the name of an architecture")
    _refuse_outside_names(configs.get("tokenizer_config.json", {}))
    return configs


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Symlinks that leave the folder, and what is no regular file."""
    for name in names:
        path = folder / name
        if target := outside(folder, name):
            raise InputRefused(
                f"{name}: a link that leaves the folder, to {target}",
                "Put the file itself into the folder, or open the folder that the link leads to.",
            )
        if not path.is_file():
            raise Incomplete(f"{name}: " + ("a link to nothing" if path.is_symlink() else "not a regular file"))
        if not fnmatchcase(name, "*.safetensors") and path.stat().st_size > TOKENIZER_JSON_BYTES:
            raise InputRefused(f"{name}: more than {TOKENIZER_JSON_BYTES >> 20} MB")


def outside(folder: Path, name: str) -> Path | None:
    """Where a file of the folder leads to, if that is not in it; the blobs of a Hub cache snapshot belong to it."""
    target = Path(os.path.realpath(folder / name))  # which takes links to themselves, too
    inside = (folder.resolve(), blobs(folder))
    return None if any(root and target.is_relative_to(root) for root in inside) else target


def _refuse_code(file: str, content: Json) -> None:
    """Keys by which a checkpoint names Python files of its own."""
    forbidden = ("auto_map", "custom_generate") + (("model_file",) if file == "config.json" else ())
    for path, key, value in walk(content):
        kernel = key.endswith("_implementation") and "/" in json.dumps(value)  # transformers runs it from the Hub
        if kernel or (key in forbidden and value not in (None, {}, [])):
            raise InputRefused(f"{file}: `{path}` asks to run code from the checkpoint", NO_CODE_HINT)


def _refuse_outside_names(tokenizer_config: Json) -> None:
    """File names in tokenizer_config.json that lead out of the folder."""
    for path, key, value in walk(tokenizer_config):
        # `special_tokens_map_file` is never opened, and many published files have their author's own path in it.
        if not key.endswith(("_file", "_files")) or key == "special_tokens_map_file":
            continue
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and (re.search(r"^[/~]|[\\:\0]", name) or ".." in name.split("/")):
                raise InputRefused(f"tokenizer_config.json: `{path}` is {name!r}, which leaves the folder")


def walk(content: object) -> Iterator[tuple[str, str, object]]:
    """(dotted path, key, value) of every key of a JSON value, the outermost first, whatever its depth."""
    queue = deque([("", content)])
    while queue:
        path, value = queue.popleft()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield f"{path}{key}", key, inner
                queue.append((f"{path}{key}.", inner))
        elif isinstance(value, list):
            queue.extend((path, inner) for inner in value)


def read_json(path: Path) -> Json:
    """The object in a JSON file of bounded size, in which no key stands twice: other readers might take the other."""
    limit = TOKENIZER_JSON_BYTES if path.name == "tokenizer.json" else OTHER_JSON_BYTES
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InputRefused(f"{path.name}: more than {limit >> 20} MB")
        vocabulary = path.name in ("tokenizer.json", "vocab.json")  # some published ones have tokens twice
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=dict if vocabulary else unique)
    except OSError as error:
        raise InputRefused(f"{path.name}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise InputRefused(f"{path.name}: nested too deeply") from error
    except ValueError as error:  # malformed JSON or UTF-8, numbers with thousands of digits
        raise InputRefused(f"{path.name}: is not JSON ({error})", lfs_hint(path)) from error
    if not isinstance(content, dict):
        raise InputRefused(f"{path.name}: expected a JSON object, found {type(content).__name__}")
    return content


# ---- weights --------------------------------------------------------------------------------------------------------


def weight_map(folder: Path, names: Collection[str]) -> dict[str, str] | None:
    """{tensor: file} of the index, with plain file names; None where there is no index."""
    if INDEX not in names:
        return None
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputRefused(f"{INDEX}: expected weight_map, an object of tensor names and files")
    for tensor, file in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+", file) or file == "..":
            raise InputRefused(f"{INDEX}: {tensor} is in {file!r}, which leaves the folder")
        if not fnmatchcase(file, WEIGHTS):
            raise InputRefused(f"{INDEX}: {tensor} is in {file!r}; weight files must be named {WEIGHTS}")
    return files


def weight_files(names: Iterable[str], weight_map: Mapping[str, str] | None) -> list[str]:
    """The files that hold the weights, in order: those of the index, or all of the name that mlx-lm loads."""
    stored = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    present = [name for name in stored if fnmatchcase(name, WEIGHTS)]
    if weight_map is not None:
        listed = sorted(set(weight_map.values()))
        if missing := [file for file in listed if file not in present]:
            raise Incomplete(f"shards missing: {INDEX} names {some(missing)}, not there")
        if extra := [file for file in present if file not in listed]:
            raise InputRefused(f"{some(extra)}: not in {INDEX}, but of the name that is loaded", "Remove one of them.")
        return listed
    if not present:
        raise InputRefused(
            f"no weights of the name {WEIGHTS}, found {some(stored) or 'none at the top level'}",
            "mlx-lm and transformers load model.safetensors, or model-00001-of-0000N.safetensors with an index.",
        )
    numbered = [match for name in present if (match := re.fullmatch(r"model-(\d+)-of-(\d+)\.safetensors", name))]
    wanted = max((int(match[2]) for match in numbered), default=0)
    if len({int(match[1]) for match in numbered}) != wanted:
        raise Incomplete(f"shards missing: {len(numbered)} of {wanted} are there ({some(present)})")
    return present


def match_index(tensors: Mapping[str, TensorInfo], weight_map: Mapping[str, str] | None) -> None:
    """Refuses an index that says other than the files."""
    if weight_map is None:
        return
    for tensor, file in weight_map.items():
        if tensor not in tensors or tensors[tensor].file != file:
            place = f"in {tensors[tensor].file}" if tensor in tensors else "in no file"
            raise InputRefused(f"{INDEX}: {tensor} should be in {file}, but is {place}")
    if extra := [tensor for tensor in tensors if tensor not in weight_map]:
        raise InputRefused(f"{tensors[extra[0]].file}: holds {some(extra)}, not listed in {INDEX}")


def embedding_rows(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> int | None:
    """Rows of the input embedding (the smallest, should there be several), or else what the config says."""
    matrices = [(name.split("."), info.shape[0]) for name, info in tensors.items() if len(info.shape) == 2]
    for module in EMBEDDINGS:
        found = [(parts, rows) for parts, rows in matrices if parts[-2:] == [module, "weight"]]
        of_text = [rows for parts, rows in found if not OTHER_MODALITIES.search(".".join(parts))]
        if found:
            return min(of_text or [rows for _, rows in found])
    for place in (config, config.get("text_config")):
        if isinstance(place, Mapping) and isinstance(place.get("vocab_size"), int):
            return int(place["vocab_size"])
    return None


# ---- token ids ------------------------------------------------------------------------------------------------------


def refuse_without_tokenizer(names: Iterable[str]) -> None:
    """A folder in which no tokenizer could be found."""
    if not any(fnmatchcase(name, pattern) for name in names for pattern in TOKENIZERS):
        raise Incomplete("no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json is there")


def token_ids(folder: Path, names: Collection[str], tokenizer_config: Json) -> Iterator[tuple[str, object, object]]:
    """(file, id, token) of every id that the tokenizer's files give away."""
    if "tokenizer.json" in names:
        yield from (("tokenizer.json", *pair) for pair in _fast_ids(read_json(folder / "tokenizer.json")))
    elif "vocab.json" in names:
        yield from (("vocab.json", index, token) for token, index in read_json(folder / "vocab.json").items())
    decoder = tokenizer_config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for index, token in decoder.items():
            content = token.get("content") if isinstance(token, dict) else token
            yield "tokenizer_config.json", int(index) if index.isascii() and index.isdigit() else index, content
    elif "added_tokens.json" in names:  # read by transformers only without a decoder
        added = read_json(folder / "added_tokens.json").items()
        yield from (("added_tokens.json", index, token) for token, index in added)


def _fast_ids(tokenizer: Json) -> Iterator[tuple[object, object]]:
    """(id, token) of tokenizer.json, both as declared and as the tokenizers library will number them."""
    for step in ("normalizer", "decoder"):
        _refuse_growth(step, tokenizer.get(step))
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: [piece, score], the id is the position
        vocab = {str(pair[0]) if isinstance(pair, list) and pair else "": index for index, pair in enumerate(vocab)}
    if not isinstance(vocab, dict) or not isinstance(added, list) or not all(isinstance(t, dict) for t in added):
        raise InputRefused("tokenizer.json: expected model.vocab and a list of added_tokens")
    yield from ((index, token) for token, index in vocab.items())
    # An added token that the vocabulary lacks gets the next free id, whatever the file declares.
    following = len(vocab)
    for token in added:
        index, content = token.get("id"), token.get("content")
        yield index, content
        if isinstance(content, str) and isinstance(vocab.get(content), int):
            following = max(following, vocab[content] + 1)
        else:
            yield following, content
            following += 1


def _refuse_growth(step: str, content: object) -> None:
    """Replacements of tokenizer.json that turn a short text into an endless one, each by itself or one on the other."""
    growth = 1
    for _, key, value in walk(content):
        if key in ("content", "prepend") and isinstance(value, str):
            growth *= max(1, len(value))
        if growth > TEXT_GROWTH:
            raise InputRefused(f"tokenizer.json: its {step} makes texts more than {TEXT_GROWTH} times as long")


def refuse_ids_beyond(rows: int | None, ids: Iterable[tuple[str, object, object]]) -> None:
    """Ids without a row: the embedding would read foreign memory."""
    rows = sys.maxsize if rows is None else rows
    for file, index, token in ids:
        if not isinstance(index, int) or isinstance(index, bool):
            raise InputRefused(f"{file}: the token {token!r} has the id {index!r}, expected a number")
        # The published Gemma 3 1B text checkpoint declares the image token of its larger siblings.
        if not 0 <= index < rows and (index, token) != (rows, "<image_soft_token>"):
            raise InputRefused(
                f"{file}: the token {token!r} has the id {index}, but the embedding has {rows} rows",
                "The tokenizer belongs to another model, or the embedding was not resized for the added tokens.",
            )


def eos_ids(file: str, config: Mapping[str, Any]) -> frozenset[int]:
    """The ids of `eos_token_id`: a number, a list of numbers, null or absent."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise InputRefused(f"{file}: eos_token_id is {value!r}, expected a token id or a list of them")
    return frozenset(ids)

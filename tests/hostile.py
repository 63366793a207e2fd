"""Checkpoint and adapter folders that someone wrote to do harm, made from a good one by one change each.

`MODELS` are refused by every command with exit code 3; where `loads` is set only those refuse that load the weights.
`HARMLESS` hold bait that nobody takes. `outside` is a folder that no command may open; code that ran would create
`outside/executed`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save, save_file

from tests.tiny import CHATML, write_llama

SECRET = "hostile-secret-7f3a"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CLEAR = "\x1b[2J\x1b[31m"  # clears a terminal and writes red
BIG = 10**10

Change = Callable[[Path, Path], object]  # of the folder, with the folder outside


@dataclass(frozen=True)
class Hostile:
    """A change and words of the refusal; `loads`: only what loads the weights can see it."""

    change: Change
    words: str
    loads: bool = False
    code: int = 3


def write_outside(folder: Path) -> Path:
    """A good checkpoint with a secret, to which links and names of the others lead."""
    write_llama(folder)
    (folder / "secret.txt").write_text(SECRET)
    (folder / "vocab.json").write_text(json.dumps({SECRET: 0}))
    return folder


class Runs:
    """What unpickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def edit(file: str, **changes: object) -> Change:
    def change(folder: Path, outside: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes}))

    return change


def write(file: str, content: str | bytes) -> Change:
    def change(folder: Path, outside: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def all_of(*changes: Change) -> Change:
    return lambda folder, outside: [change(folder, outside) for change in changes]


def code(*files: str) -> Change:
    """Python files that create the sentinel."""

    def change(folder: Path, outside: Path) -> None:
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(f"open({str(outside / 'executed')!r}, 'w')\n")

    return change


def pickled(file: str) -> Change:
    return lambda folder, outside: (folder / file).write_bytes(pickle.dumps(Runs(outside / "executed")))


def remove(*files: str) -> Change:
    return lambda folder, outside: [(folder / file).unlink() for file in files]


def in_place_of(file: str, make: Callable[[Path, Path], object]) -> Change:
    """Something else under the name of a file; `make` gets the path and the folder outside."""

    def change(folder: Path, outside: Path) -> None:
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        make(path, outside)

    return change


def link_out(file: str, to: str = "") -> Change:
    return in_place_of(file, lambda path, outside: path.symlink_to(outside / (to or file)))


def listen(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket has room for 100 bytes
        server.bind(path.name)
        os.chdir(here)


# ---- safetensors ----------------------------------------------------------------------------------------------------


def read_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_parts(path: Path, header: str, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + body)


def header(rewrite: Callable[[dict[str, Any]], str | dict[str, Any]], file: str = WEIGHTS) -> Change:
    """The header of the weights rewritten, as an object or as text."""

    def change(folder: Path, outside: Path) -> None:
        entries, body = read_parts(folder / file)
        made = rewrite(entries)
        write_parts(folder / file, made if isinstance(made, str) else json.dumps(made), body)

    return change


def entry(file: str = WEIGHTS, **changes: object) -> Change:
    """One tensor described differently."""
    name = "model.norm.weight" if file == WEIGHTS else "model.layers.0.self_attn.q_proj.lora_a"
    return header(lambda entries: {**entries, name: {**entries[name], **changes}}, file)


def overlapping(entries: dict[str, Any]) -> dict[str, Any]:
    twin = entries["model.layers.0.input_layernorm.weight"]
    return {**entries, "model.norm.weight": twin}


def twice(entries: dict[str, Any]) -> str:
    text = json.dumps(entries)
    return text[:-1] + f', "model.norm.weight": {json.dumps(entries["model.norm.weight"])}}}'


def promised_header(folder: Path, outside: Path) -> None:
    """A file, nothing on the disk, that says its header has 200 MB."""
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_100)


def real_header(megabytes: int) -> Change:
    """A header of so many MB that would be read if anyone read it."""

    def change(folder: Path, outside: Path) -> None:
        entries, body = read_parts(folder / WEIGHTS)
        entries["__metadata__"] = {"format": "pt", "padding": "x" * megabytes * 1_000_000}
        write_parts(folder / WEIGHTS, json.dumps(entries), body)

    return change


def tensors(**changes: np.ndarray | None) -> Change:
    """Tensors added, exchanged, or left out where None; `__` in their names stands for a dot."""

    def change(folder: Path, outside: Path) -> None:
        found: dict[str, np.ndarray | None] = dict(load_file(folder / WEIGHTS))
        found |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({n: t for n, t in found.items() if t is not None}, folder / WEIGHTS)

    return change


def sharded(folder: Path, outside: Path) -> None:
    """The same weights in two shards with an index."""
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, where = sorted(found), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: found[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def weight_map(**changes: str) -> Change:
    def change(folder: Path, outside: Path) -> None:
        sharded(folder, outside)
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"] |= {name: value.format(outside=outside) for name, value in changes.items()}
        (folder / INDEX).write_text(json.dumps(content))

    return change


def cut(file: str) -> Change:
    return lambda folder, outside: (folder / file).write_bytes((folder / file).read_bytes()[:-1000])


def sparse(folder: Path, outside: Path) -> None:
    """Four TB of zeros that take no room on the disk: an embedding to match a config that asks for it."""
    rows = 1 << 35
    entries, _ = read_parts(folder / WEIGHTS)
    end = rows * 32 * 4
    start = 0
    for name, one in entries.items():
        if name not in ("__metadata__", "model.embed_tokens.weight"):
            size = one["data_offsets"][1] - one["data_offsets"][0]
            one["data_offsets"] = [end + start, end + start + size]
            start += size
    entries["model.embed_tokens.weight"] = {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, end]}
    text = json.dumps(entries).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end + start)
    edit("config.json", vocab_size=rows)(folder, outside)


# ---- tokenizers and templates ---------------------------------------------------------------------------------------


def tokenizer(rewrite: Callable[[dict[str, Any]], object]) -> Change:
    """tokenizer.json changed in place."""

    def change(folder: Path, outside: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        rewrite(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return change


def split_at(regex: str) -> Change:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return tokenizer(lambda t: t.update(pre_tokenizer=step))


def replacing(pattern: str, content: str, times: int) -> Change:
    steps = [step_of(pattern, content)] * times
    return tokenizer(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": steps}))


def step_of(pattern: str, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def template(text: str) -> Change:
    """A chat template in tokenizer_config.json: an attack, and then ChatML. `EXECUTED` is the sentinel's path."""

    def change(folder: Path, outside: Path) -> None:
        edit("tokenizer_config.json", chat_template=text.replace("EXECUTED", str(outside / "executed")) + CHATML)(
            folder, outside
        )

    return change


DOUBLED = "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x STEP %}{% endfor %}"
LAUGHS = "{% set a = ['ha'] %}" + "{% set a = [a, a, a, a, a, a, a, a, a, a] %}" * 10
GLOBALS = "__init__.__globals__"

TEMPLATES: dict[str, str] = {
    "template loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "template range": "{% for i in range(10000000000) %}{% endfor %}",
    "template repeats": "{{ 'a' * 10000000000 }}",
    "template repeats a list": "{% set a = [messages] * 10000000000 %}",
    "template power": "{{ 10 ** 10000000000 }}",
    "template multiplies": "{% set ns = namespace(x=99999999) %}"
    "{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "template doubles": DOUBLED.replace("STEP", "~ ns.x"),
    "template adds": DOUBLED.replace("STEP", "+ ns.x"),
    "template joins": DOUBLED.replace("STEP", "").replace("ns.x  %", "[ns.x, ns.x] | join %"),
    "template formats": "{{ '%10000000000s' % 'x' }}",
    "template format filter": "{{ '%*s' | format(10000000000, 'x') }}",
    "template str.format": "{{ '{:>10000000000}'.format('x') }}",
    "template str.center": "{{ 'x'.center(10000000000) }}",
    "template center": "{{ 'x' | center(10000000000) }}",
    "template indents": "{{ 'x\ny' | indent(10000000000) }}",
    "template replaces": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "template replace filter": "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
    "template str.join": "{% set a = 'a' * 1000000 %}{{ a.join(range(99999) | map('string')) }}",
    "template writes": "{% set a = 'a' * 1000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "template fills": "{% set a = messages | batch(10000000000, 'x') | list %}",
    "template laughs": LAUGHS + "{{ a }}",
    "template laughs as JSON": LAUGHS + "{{ a | tojson }}",
    "template laughs into a string": LAUGHS + "{% set b = a | string %}",
    "template hoards": "{% set ns = namespace(x=[]) %}{% set a = 'a' * 1000000 %}"
    "{% for i in range(99999) %}{% set ns.x = ns.x + [a ~ i] %}{% endfor %}",
    "template recurses": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "template nests": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "template is no template": "{% if %}",
    "template raises": "{{ raise_exception('" + CLEAR + "no') }}",
    "template subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "template globals": "{{ cycler." + GLOBALS + ".os.system('touch EXECUTED') }}",
    "template builtins": "{{ raise_exception.__globals__['__builtins__']['open']('EXECUTED', 'w') }}",
    "template format escape": "{{ '{0.__class__.__mro__[1].__subclasses__}'.format('')() }}",
    "template attr": "{{ (messages | attr('__class__')).__mro__ }}",
    "template map attr": "{{ (messages | map(attribute='__class__.__mro__') | list)[0][1] }}",
    "template includes": "{% include '/etc/passwd' %}",
    "template imports": "{% import 'os' as os %}{{ os.system('touch EXECUTED') }}",
    "template changes messages": "{{ messages.append(1) }}",
    "template lipsum": "{{ lipsum.__globals__['os'].popen('touch EXECUTED').read() }}",
}

MODELS: dict[str, Hostile] = {
    # --- code
    "model_file": Hostile(all_of(code("evil.py"), edit("config.json", model_file="evil.py")), "`model_file` asks"),
    "auto_map of the config": Hostile(
        all_of(code("evil.py"), edit("config.json", auto_map={"AutoConfig": "evil.C"}, model_type="evil")), "`auto_map`"
    ),
    "auto_map of the model": Hostile(
        all_of(code("evil.py"), edit("config.json", auto_map={"AutoModelForCausalLM": "evil.M"})), "`auto_map`"
    ),
    "auto_map of the tokenizer": Hostile(
        all_of(code("evil.py"), edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})),
        "tokenizer_config.json: `auto_map`",
    ),
    "auto_map of a repository": Hostile(
        edit("config.json", auto_map={"AutoConfig": "evil/repository--evil.C"}), "config.json: `auto_map`"
    ),
    "auto_map below": Hostile(
        all_of(code("evil.py"), edit("config.json", text_config={"auto_map": {"AutoConfig": "evil.C"}})),
        "`text_config.auto_map`",
    ),
    "auto_map twice": Hostile(  # the first says nothing, the second does
        all_of(
            code("evil.py"),
            lambda f, o: (f / "config.json").write_text(
                '{"auto_map": {}, ' + (f / "config.json").read_text()[1:-1] + ', "auto_map": {"AutoConfig": "evil.C"}}'
            ),
        ),
        "auto_map",
    ),
    "custom_generate": Hostile(
        all_of(code("custom_generate/generate.py"), edit("generation_config.json", custom_generate="evil/x")),
        "generation_config.json: `custom_generate`",
    ),
    "kernel of a repository": Hostile(edit("config.json", attn_implementation="evil/kernel"), "`attn_implementation`"),
    "kernels below": Hostile(
        edit("config.json", text_config={"_attn_implementation": {"text": "evil/kernel:flash"}}),
        "`text_config._attn_implementation`",
    ),
    # --- pickle
    "pickle": Hostile(all_of(remove(WEIGHTS), pickled("pytorch_model.bin")), "pickle only (pytorch_model.bin)"),
    "pickle as safetensors": Hostile(pickled(WEIGHTS), "model.safetensors: is not valid safetensors"),
    "pickle in the index": Hostile(
        all_of(weight_map(**{"model.norm.weight": "pytorch_model.bin"}), pickled("pytorch_model.bin")),
        "'pytorch_model.bin'",
    ),
    "pickle as tokenizer": Hostile(pickled("tokenizer.json"), "tokenizer.json: is not JSON"),
    # --- names and links
    "weight_map above": Hostile(weight_map(x="../outside/model.safetensors"), "which leaves the folder"),
    "weight_map absolute": Hostile(weight_map(x="{outside}/model.safetensors"), "which leaves the folder"),
    "weight_map to nothing": Hostile(weight_map(x="model-00003-of-00003.safetensors"), "shards missing"),
    "weight_map with control characters": Hostile(weight_map(x=f"model{CLEAR}\n.safetensors"), "shards missing"),
    "weight_map of numbers": Hostile(
        all_of(sharded, lambda f, o: edit(INDEX, weight_map={"x": 1})(f, o)), "which leaves the folder"
    ),
    "vocab_file absolute": Hostile(
        lambda f, o: edit("tokenizer_config.json", vocab_file=str(o / "vocab.json"))(f, o), "`vocab_file`"
    ),
    "vocab_file above": Hostile(edit("tokenizer_config.json", vocab_file="../outside/vocab.json"), "`vocab_file`"),
    "tokenizer_file above": Hostile(
        edit("tokenizer_config.json", tokenizer_file="../outside/tokenizer.json"), "`tokenizer_file`"
    ),
    **{
        f"link out: {file}": Hostile(link_out(file, to), f"{file}: a link that leaves the folder")
        for file, to in {
            "config.json": "",
            WEIGHTS: "",
            "tokenizer.json": "",
            "tokenizer_config.json": "",
            "chat_template.jinja": "secret.txt",
            "additional_chat_templates/x.jinja": "secret.txt",
            "special_tokens_map.json": "vocab.json",
        }.items()
    },
    "folder of templates linked out": Hostile(
        lambda f, o: [(o / "chat.jinja").write_text(SECRET), (f / "additional_chat_templates").symlink_to(o)],
        "additional_chat_templates: a link",
    ),
    **{
        f"{what} as {file}": Hostile(in_place_of(file, make), words)
        for what, make, words in (
            ("endless device", lambda p, o: p.symlink_to("/dev/zero"), "a link that leaves the folder"),
            ("pipe", lambda p, o: os.mkfifo(p), "not a regular file"),
            ("socket", listen, "not a regular file"),
        )
        for file in ("config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja", "generation_config.json")
    },
    "folder as config.json": Hostile(in_place_of("config.json", lambda p, o: p.mkdir()), "config.json is missing"),
    f"folder as {WEIGHTS}": Hostile(in_place_of(WEIGHTS, lambda p, o: p.mkdir()), "no weights"),
    "folder as tokenizer.json": Hostile(in_place_of("tokenizer.json", lambda p, o: p.mkdir()), "tokenizer"),
    "link to itself": Hostile(in_place_of("config.json", lambda p, o: p.symlink_to("config.json")), "config.json"),
    "file name with control characters": Hostile(
        lambda f, o: shutil.copy(f / WEIGHTS, f / f"model{CLEAR}\nError: x.safetensors"), "stored a second time"
    ),
    "adapter inside": Hostile(
        edit("adapter_config.json", base_model_name_or_path="/outside", peft_type="LORA"), "adapter_config.json"
    ),
    # --- safetensors
    "overlapping tensors": Hostile(header(overlapping), "is not valid safetensors"),
    "duplicate tensors": Hostile(header(twice), WEIGHTS),
    "negative shape": Hostile(entry(shape=[-32]), "is not valid safetensors"),
    "fractional shape": Hostile(entry(shape=[32.0]), "is not valid safetensors"),
    "shape that overflows": Hostile(entry(shape=[1 << 62, 8]), "is not valid safetensors"),
    "shape larger than its bytes": Hostile(entry(shape=[64]), "is not valid safetensors"),
    "offsets reversed": Hostile(entry(data_offsets=[128, 0]), "is not valid safetensors"),
    "offsets beyond the file": Hostile(entry(data_offsets=[0, 1 << 50]), "is not valid safetensors"),
    "dtype unknown": Hostile(entry(dtype="PICKLE"), "is not valid safetensors"),
    "header of 200 MB promised": Hostile(promised_header, WEIGHTS),
    "header of 200 MB": Hostile(real_header(200), WEIGHTS),
    "header of 90 MB": Hostile(real_header(90), WEIGHTS),
    "header a list": Hostile(header(lambda _: "[]"), "is not valid safetensors"),
    "header nested deeply": Hostile(header(lambda _: '{"x":' + "[" * 100_000), "is not valid safetensors"),
    "header of NaN": Hostile(header(lambda e: json.dumps(e).replace("[32]", "[NaN]")), "is not valid safetensors"),
    "truncated weights": Hostile(cut(WEIGHTS), "is not valid safetensors"),
    "truncated shard": Hostile(
        all_of(sharded, cut("model-00002-of-00002.safetensors")),
        "model-00002-of-00002.safetensors: is not valid safetensors",
    ),
    "tensor name with control characters": Hostile(
        all_of(sharded, lambda f, o: save_file({f"{CLEAR}\nx": np.ones(1)}, f / "model-00001-of-00002.safetensors")),
        "model.safetensors.index.json",
    ),
    "tensor of another name": Hostile(
        tensors(**{"model__norm__weight": None, f"{CLEAR}x": np.zeros(32, np.float32)}), "", loads=True
    ),
    "tensor missing": Hostile(tensors(model__norm__weight=None), "model.norm.weight", loads=True),
    "tensor of another shape": Hostile(tensors(model__norm__weight=np.ones(7, np.float32)), "", loads=True),
    "embedding of one axis": Hostile(tensors(model__embed_tokens__weight=np.ones(9, np.float32)), "", loads=True),
    "four TB of nothing": Hostile(sparse, "GiB of memory", loads=True, code=4),
    # --- config.json
    "config huge": Hostile(
        write("config.json", b'{"model_type": "llama", "x": "' + b"x" * (11 << 20) + b'"}'), "10 MB"
    ),
    "config deep": Hostile(write("config.json", '{"model_type": "llama", "x": ' + "[" * 200_000), "nested too deeply"),
    "config a list": Hostile(write("config.json", '[{"model_type": "llama"}]'), "expected a JSON object, found list"),
    "config not UTF-8": Hostile(write("config.json", b'{"model_type": "\xff\xfe"}'), "is not JSON"),
    "config empty": Hostile(write("config.json", ""), "is not JSON"),
    "model_type with control characters": Hostile(edit("config.json", model_type=f"{CLEAR}llama"), "model_type is"),
    "model_type a path": Hostile(edit("config.json", model_type="../evil"), "model_type is '../evil'"),
    "model_type unknown": Hostile(edit("config.json", model_type="evil"), "evil", loads=True),
    "model_type a module": Hostile(edit("config.json", model_type="cache"), "cache", loads=True),
    "eos_token_id an object": Hostile(edit("config.json", eos_token_id={"a": 1}), "eos_token_id"),
    **{
        f"{name} {value!r:.12}": Hostile(edit("config.json", **{name: value}), "", loads=True)
        for name, values in {
            "hidden_size": (float("nan"), -32, 0, 1 << 40, 1 << 70, "32", None, [32]),
            "vocab_size": (float("nan"), -1, 0, 1 << 40, "x"),
            "num_hidden_layers": (float("nan"), -2, 1 << 40, 2.5, "2", 10**7),
            "num_attention_heads": (0, -4, 1 << 40, float("inf")),
            "num_key_value_heads": (0, 1 << 40),
            "intermediate_size": (-1, 1 << 40),
            "head_dim": (-8, 1 << 40),
            "rms_norm_eps": ("x", None),
            "rope_theta": ("x", [1]),
            "rope_scaling": ([1], {"rope_type": "evil"}, {"rope_type": "llama3", "factor": "x"}),
            "quantization": ([4], 4),
            "tie_word_embeddings": (False,),
        }.items()
        for value in values
    },
    "num_labels": Hostile(edit("config.json", num_labels=1 << 40), "num_labels"),
    # --- tokenizer
    "tokenizer malformed": Hostile(write("tokenizer.json", "{"), "tokenizer.json: is not JSON"),
    "tokenizer a list": Hostile(write("tokenizer.json", "[]"), "tokenizer.json: expected a JSON object"),
    "tokenizer huge": Hostile(
        write("tokenizer.json", b'{"x": "' + b"x" * (65 << 20) + b'"}'), "tokenizer.json: more than 64 MB"
    ),
    "tokenizer deep": Hostile(write("tokenizer.json", '{"model": ' + "[" * 200_000), "nested too deeply"),
    "tokenizer of no model": Hostile(tokenizer(lambda t: t["model"].update(type="Evil")), "tokenizer"),
    "tokenizer without merges": Hostile(tokenizer(lambda t: t["model"].update(merges=[["q", "€€"]])), "tokenizer"),
    "tokenizer ids beyond the embedding": Hostile(
        tokenizer(lambda t: t["model"]["vocab"].update(zzz=9999)), "has the id 9999, but the embedding"
    ),
    "tokenizer id negative": Hostile(tokenizer(lambda t: t["model"]["vocab"].update(zzz=-1)), "has the id -1"),
    "added ids beyond": Hostile(
        edit("tokenizer_config.json", added_tokens_decoder={"99999": {"content": f"{CLEAR}<x>", "special": True}}),
        "has the id 99999",
    ),
    "regex that is none": Hostile(split_at("(("), "tokenizer"),
    "regex that never ends": Hostile(split_at("((?:[a-z]|[a-z ]|[a-z.])+)+!$"), "tokenizer"),
    "normalizer that doubles": Hostile(replacing("a", "aa", 40), "tokenizer.json"),
    "normalizer that bloats": Hostile(replacing("a", "a" * 1_000_000, 1), "tokenizer.json"),
    "decoder that doubles": Hostile(
        tokenizer(lambda t: t.update(decoder={"type": "Sequence", "decoders": [step_of("a", "aa")] * 40})),
        "tokenizer.json: its decoder",
    ),
    "tokenizer_config a list": Hostile(write("tokenizer_config.json", "[]"), "tokenizer_config.json: expected"),
    "eos_token an object": Hostile(edit("tokenizer_config.json", eos_token={"evil": 1}), "tokenizer"),
    "eos_token a number": Hostile(edit("tokenizer_config.json", eos_token=7), "token"),
    "added_tokens_decoder of numbers": Hostile(edit("tokenizer_config.json", added_tokens_decoder={"1": 5}), "token"),
    "tokenizer_class a number": Hostile(edit("tokenizer_config.json", tokenizer_class=5), "token"),
    "sentencepiece of noise": Hostile(
        all_of(
            remove("tokenizer.json"),
            write("tokenizer.model", os.urandom(4000)),
            edit("tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
        ),
        "token",
    ),
    # --- templates
    **{name: Hostile(template(text), "chat template") for name, text in TEMPLATES.items()},
    "template not UTF-8": Hostile(write("chat_template.jinja", b"\xff\xfe\x00"), "the tokenizer cannot be loaded"),
    "template huge": Hostile(
        write("chat_template.jinja", "{# " + "x" * (12 << 20) + " #}"), "chat template model: has"
    ),
    "template a number": Hostile(edit("tokenizer_config.json", chat_template=5), "chat_template"),
    "template a list of numbers": Hostile(
        edit("tokenizer_config.json", chat_template=[1]), "the tokenizer cannot be loaded"
    ),
    # --- generation_config.json
    "generation_config a list": Hostile(write("generation_config.json", "[]"), "generation_config.json: expected"),
    "generation_config of an end that is no id": Hostile(
        edit("generation_config.json", eos_token_id="</s>"), "generation_config.json: eos_token_id"
    ),
    "generation_config of an end below zero": Hostile(
        edit("generation_config.json", eos_token_id=[2, -1]), "eos_token"
    ),
}

HARMLESS: dict[str, Change] = {
    "nothing": all_of(),
    "code that nothing names": code("evil.py", "json.py", "mlx_lm.py", "transformers.py", "sitecustomize.py"),
    "pickle that nothing names": all_of(pickled("pytorch_model.bin"), pickled("training_args.bin")),
    "names of elsewhere": edit("config.json", _name_or_path="../outside", transformers_version="999"),
    "quantization of wrong numbers": edit("config.json", quantization={"bits": 1 << 40, "group_size": 0}),
    "generation_config of wrong types": edit("generation_config.json", temperature="x", top_k=[1], max_length=-1),
    "padding to 10**9": tokenizer(
        lambda t: t.update(
            padding={
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<s>",
            },
            truncation={"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        )
    ),
    "outputs of another kind": edit("config.json", return_dict=False, output_attentions=True),
    "folder as template": in_place_of("chat_template.jinja", lambda p, o: p.mkdir()),
    "README with control characters": write("README.md", CLEAR),
    "README linked out": link_out("README.md", "secret.txt"),
    "lock linked out": link_out("lock.json", "secret.txt"),
    "lock malformed": write("lock.json", "[" * 200_000),
}

# ---- adapters -------------------------------------------------------------------------------------------------------

ADAPTER = "adapters.safetensors"
CONFIG = "adapter_config.json"


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / ADAPTER).write_bytes(save(dict(tensors)))
    return folder


def good_adapter(folder: Path) -> Path:
    """Rank 2 on one matrix of the tiny Llama."""
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    made = {}
    for i in range(2):
        made[f"model.layers.{i}.self_attn.q_proj.lora_a"] = np.full((32, 2), 0.01, np.float32)
        made[f"model.layers.{i}.self_attn.q_proj.lora_b"] = np.full((2, 32), 0.01, np.float32)
    return write_adapter(folder, config, made)


def parameters(**changes: object) -> Change:
    def change(folder: Path, outside: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        content["lora_parameters"] |= changes
        (folder / CONFIG).write_text(json.dumps(content))

    return change


def many_bad_tensors(folder: Path, outside: Path) -> None:
    save_file({f"{CLEAR}{i}": np.zeros(1, np.float32) for i in range(20_000)}, folder / ADAPTER)


def sparse_adapter(folder: Path, outside: Path) -> None:
    """One tensor of four TB that take no room on the disk."""
    name, columns = "model.layers.0.self_attn.q_proj.lora_a", 1 << 35
    text = json.dumps({name: {"dtype": "F32", "shape": [32, columns], "data_offsets": [0, 128 * columns]}}).encode()
    (folder / ADAPTER).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / ADAPTER, 8 + len(text) + 128 * columns)


ADAPTERS: dict[str, Hostile] = {
    "config a list": Hostile(write(CONFIG, "[]"), "expected a JSON object"),
    "config deep": Hostile(write(CONFIG, "[" * 200_000), CONFIG),
    "config huge": Hostile(write(CONFIG, b'{"x": "' + b"x" * (70 << 20) + b'"}'), CONFIG),
    "config missing": Hostile(remove(CONFIG), f"{CONFIG} is missing"),
    "type unknown": Hostile(edit(CONFIG, fine_tune_type="evil"), "fine_tune_type"),
    "type an object": Hostile(edit(CONFIG, fine_tune_type={"evil": 1}), "fine_tune_type"),
    "layers negative": Hostile(edit(CONFIG, num_layers=-5), "num_layers"),
    "layers a string": Hostile(edit(CONFIG, num_layers="all"), "num_layers"),
    "rank enormous": Hostile(parameters(rank=1 << 40), "rank"),
    "rank 0": Hostile(parameters(rank=0), "rank"),
    "scale NaN": Hostile(parameters(scale=float("nan")), "scale"),
    "dropout a string": Hostile(parameters(dropout="x"), "dropout"),
    "dropout 2": Hostile(parameters(dropout=2.0), "dropout"),
    "keys of elsewhere": Hostile(parameters(keys=[f"../{CLEAR}evil"]), ""),
    "keys a string": Hostile(parameters(keys="q_proj"), "keys"),
    "parameters missing": Hostile(edit(CONFIG, lora_parameters=None), "lora_parameters"),
    "PEFT pickle": Hostile(
        all_of(
            remove(ADAPTER),
            pickled("adapter_model.bin"),
            edit(CONFIG, peft_type="LORA", base_model_name_or_path="../outside"),
        ),
        "adapter_model.bin",
    ),
    "pickle as safetensors": Hostile(pickled(ADAPTER), "is not valid safetensors"),
    "link out: weights": Hostile(
        in_place_of(ADAPTER, lambda p, o: p.symlink_to(good_adapter(o / "adapter") / ADAPTER)), "link"
    ),
    "link out: config": Hostile(
        in_place_of(CONFIG, lambda p, o: p.symlink_to(good_adapter(o / "adapter") / CONFIG)), "link"
    ),
    "pipe as weights": Hostile(in_place_of(ADAPTER, lambda p, o: os.mkfifo(p)), ADAPTER),
    "pipe as config": Hostile(in_place_of(CONFIG, lambda p, o: os.mkfifo(p)), CONFIG),
    "device as config": Hostile(in_place_of(CONFIG, lambda p, o: p.symlink_to("/dev/zero")), CONFIG),
    "folder as config": Hostile(in_place_of(CONFIG, lambda p, o: p.mkdir()), CONFIG),
    "overlapping tensors": Hostile(
        header(lambda e: {**e, **dict.fromkeys(sorted(e)[:2], e[min(e)])}, ADAPTER), "is not valid safetensors"
    ),
    "negative shape": Hostile(entry(ADAPTER, shape=[-32, 2]), "is not valid safetensors"),
    "dtype unknown": Hostile(entry(ADAPTER, dtype="X"), "is not valid safetensors"),
    "truncated": Hostile(lambda f, o: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:-9]), "not valid safetens"),
    "many bad tensors": Hostile(many_bad_tensors, "is no part of a low-rank adapter"),
    "one TB behind the tensors": Hostile(lambda f, o: os.truncate(f / ADAPTER, 1 << 40), "is not valid safetensors"),
    "four TB of nothing": Hostile(sparse_adapter, "GiB of memory", code=4),
    "passport of wrong types": Hostile(
        edit(CONFIG, mlxsft={"base": {"sha256": {"model.safetensors": [1]}, "name": CLEAR}}), ""
    ),
    "template that loops": Hostile(
        edit(CONFIG, mlxsft={"template": {"name": f"{CLEAR}x", "text": TEMPLATES["template loops"] + CHATML}}),
        "chat template",
    ),
    "template that escapes": Hostile(
        edit(CONFIG, mlxsft={"template": {"name": "x", "text": TEMPLATES["template globals"] + CHATML}}),
        "chat template",
    ),
}


def make_model(case: str, good: Path, folder: Path, outside: Path) -> Path:
    """The folder of one case, from a copy of a good one."""
    shutil.copytree(good, folder)
    (MODELS[case].change if case in MODELS else HARMLESS[case])(folder, outside)
    return folder


def make_adapter(case: str, folder: Path, outside: Path) -> Path:
    ADAPTERS[case].change(good_adapter(folder), outside)
    return folder

"""llama.cpp itself, in this process: what it makes of a GGUF file."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A model in llama.cpp's server, asked over its own HTTP interface."""

    def __init__(self, server: Any) -> None:
        self._server, self._address = server, server.listening_address

    def _post(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def greedy(self, tokens: Sequence[int], count: int, **options: Any) -> list[int]:
        """The likeliest next tokens, until one that ends an answer."""
        asked = {"n_predict": count, "temperature": 0, "top_k": 1, "return_tokens": True}
        return list(self._post("/completion", prompt=list(tokens), cache_prompt=False, **asked | options)["tokens"])

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        return list(self._post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"])

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """What the file's chat template makes of a conversation."""
        return str(self._post("/apply-template", messages=list(messages))["prompt"])

    def answer(self, question: str, count: int) -> str:
        """Of the chat, greedily."""
        asked = {"messages": [{"role": "user", "content": question}], "max_tokens": count, "temperature": 0}
        return str(self._post("/v1/chat/completions", **asked)["choices"][0]["message"]["content"])


@contextmanager
def loaded(model: Path, *, lora: Path | None = None) -> Iterator[LlamaCpp]:
    """llama.cpp with a model, computing in float32 wherever the file lets it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(model), 512, 1, -1
    params.n_gpu_layers, params.warmup, params.fit_params = 0, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    yield LlamaCpp(xllamacpp.Server(params))

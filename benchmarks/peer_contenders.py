"""OpenVINO GenAI and llama.cpp as contenders, in the peers' environment: see contenders.py.

openvino-*   LLMPipeline on the CPU, greedy; each token's time is taken where it is streamed.
llama-*      llama-cpp-python: the prompt in batches, then a token at a time by argmax.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

from .contenders import timed
from .peer_models import GGUF_FILE, LLAMA_TYPES


def _facts(folder: Path, package: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return {**facts, "version": f"{package} {importlib.metadata.version(package)}"}


def _prompt(size: int, length: int, seed: int) -> Any:
    import numpy

    return numpy.random.default_rng(seed).integers(2, size, length)


class OpenVino:
    """A folder of peer_models.openvino, on every core; by itself it takes only whole ones."""

    def __init__(self, folder: Path, prompt: int, gen: int) -> None:
        import openvino_genai

        self.facts = _facts(folder, "openvino-genai")
        self.pipe = openvino_genai.LLMPipeline(
            str(folder), "CPU", INFERENCE_NUM_THREADS=os.cpu_count() or 1
        )
        self.vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        self.prompt, self.gen = prompt, gen

    def round(self, seed: int) -> dict[str, Any]:
        import numpy
        import openvino
        import openvino_genai

        times: list[float] = []

        class Times(openvino_genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: Any) -> Any:
                count = len(token) if isinstance(token, list) else 1
                times.extend([time.perf_counter()] * count)
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None: ...

        ids = _prompt(self.vocab_size, self.prompt, seed)[None].astype(numpy.int64)
        mask = openvino.Tensor(numpy.ones_like(ids))
        config = openvino_genai.GenerationConfig(
            max_new_tokens=self.gen, ignore_eos=True, do_sample=False
        )
        started = time.perf_counter()
        self.pipe.generate(
            openvino_genai.TokenizedInputs(openvino.Tensor(ids), mask), config, Times()
        )
        assert len(times) == self.gen, f"{len(times)} tokens came of {self.gen}"
        return timed(started, times[0], times[-1], self.prompt, self.gen)


class LlamaCpp:
    """A folder of peer_models.llama."""

    def __init__(self, folder: Path, prompt: int, gen: int) -> None:
        import llama_cpp

        self.facts = _facts(folder, "llama-cpp-python")
        cores = os.cpu_count() or 1
        self.model = llama_cpp.Llama(
            str(folder / GGUF_FILE),
            n_ctx=prompt + gen,
            n_threads=cores,
            n_threads_batch=cores,
            verbose=False,
        )
        self.vocab_size = self.model.n_vocab()
        self.prompt, self.gen = prompt, gen

    def round(self, seed: int) -> dict[str, Any]:
        self.model.reset()
        ids = _prompt(self.vocab_size, self.prompt, seed).tolist()
        started = time.perf_counter()
        token = self._next(ids)
        prefilled = time.perf_counter()
        for _ in range(self.gen - 1):
            token = self._next([token])
        return timed(started, prefilled, time.perf_counter(), self.prompt, self.gen)

    def _next(self, ids: list[int]) -> int:
        import llama_cpp
        import numpy

        self.model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


def make(name: str, folder: Path, prompt: int, gen: int) -> OpenVino | LlamaCpp:
    """The peer of that name over a folder of peer_models.py."""
    return (LlamaCpp if name in LLAMA_TYPES else OpenVino)(folder, prompt, gen)

"""What is measured: each contender loads a model and runs one round of prefill and decode.

Every round has a new prompt of random tokens; decoding is greedy and never stops early. All use as
many threads as torch takes by default, and the checkpoint's bf16.

    smelt-*      an artifact, through the engine: scheduler, paged cache, sampler, detokenizer.
    hf-eager     transformers with its default (sdpa) attention and a growing cache, in a bare loop
                 of forward and argmax: what `generate` does, without its bookkeeping.
    hf-compile   the same with a static cache of exactly the needed length; the decode step goes
                 through torch.compile (mode "max-autotune-no-cudagraphs" gains nothing on a CPU, so
                 the default), the prompt runs eagerly, as `generate` does it.
    openvino-*, llama-*   other programs, in an environment of their own: peer_contenders.py.
    bandwidth    all threads read a buffer far larger than the caches.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Protocol

from .peer_models import LLAMA_TYPES, OPENVINO_BITS

NAMES = (
    *("smelt-bf16", "smelt-int8", "smelt-int4", "smelt-int3", "smelt-w8a8"),
    *("hf-eager", "hf-compile"),
)
PEERS = (*OPENVINO_BITS, *LLAMA_TYPES)


class Contender(Protocol):
    """A loaded model. facts: what is to be noted about it once, as JSON."""

    facts: dict[str, Any]

    def round(self, seed: int) -> dict[str, Any]:
        """Run one prompt and its answer; times in seconds, counts of tokens."""


def timed(started: float, first: float, last: float, prompt: int, gen: int) -> dict[str, Any]:
    """A round, from the times at which it started and its first and last tokens came."""
    return {
        "prefill_s": first - started,
        "decode_s": last - first,
        "ttft_s": first - started,
        "prefill_tokens": prompt,
        "decode_tokens": gen - 1,
    }


class Smelt:
    """An artifact behind the engine."""

    def __init__(self, folder: Path, prompt: int, gen: int) -> None:
        import smelt

        # A whole number of blocks, so that prompt and answer fit and no memory lies unused.
        self.llm = smelt.load(folder, kv_cache_tokens=-(-(prompt + gen) // 64) * 64)
        self.prompt, self.gen = prompt, gen
        artifact = self.llm.artifact
        assert artifact is not None
        memory = artifact.manifest.memory
        self.facts = {
            "weight_bytes_per_token": memory["weight_bytes_per_token"],
            "weights_bytes": memory["weights_bytes"],
            "quant": artifact.manifest.quant,
        }

    def round(self, seed: int) -> dict[str, Any]:
        from smelt.runtime.measure import run_round

        return vars(run_round(self.llm.engine, self.prompt, self.gen, 1, seed))


class Transformers:
    """A checkpoint in transformers; compiled: static cache and torch.compile for decode steps."""

    def __init__(self, folder: Path, prompt: int, gen: int, compiled: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, StaticCache

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.prompt, self.gen = prompt, gen
        self.cache = None
        self.step = self.model
        if compiled:
            self.cache = StaticCache(config=self.model.config, max_cache_len=prompt + gen)
            self.step = torch.compile(self.model)
        table = 0
        if not self.model.config.tie_word_embeddings:
            table = self.model.get_input_embeddings().weight.nbytes
        total = sum(p.nbytes for p in self.model.parameters())
        self.facts = {"weight_bytes_per_token": total - table, "weights_bytes": total}

    def round(self, seed: int) -> dict[str, Any]:
        import torch

        make = torch.Generator().manual_seed(seed)
        size = self.model.config.vocab_size
        ids = torch.randint(0, size, (1, self.prompt), generator=make)
        with torch.inference_mode():
            return self._run(ids)

    def _run(self, ids: Any) -> dict[str, Any]:
        import torch

        cache = self.cache
        started = time.perf_counter()
        if cache is not None:
            cache.reset()
        out = self.model(
            ids,
            position_ids=torch.arange(self.prompt)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.item()
        prefilled = time.perf_counter()
        for position in range(self.prompt, self.prompt + self.gen - 1):
            out = self.step(
                token,
                position_ids=torch.tensor([[position]]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.item()  # a stream shows each token before the next
        return timed(started, prefilled, time.perf_counter(), self.prompt, self.gen)


class Reading:
    """Memory bandwidth, in a process that holds nothing else."""

    def __init__(self) -> None:
        from smelt.runtime.measure import Bandwidth

        self.bandwidth = Bandwidth()
        self.facts: dict[str, Any] = {}

    def round(self, seed: int) -> dict[str, Any]:
        return {"bytes_per_s": self.bandwidth.measure()}


def make(name: str, folder: Path, prompt: int, gen: int) -> Contender:
    """The contender of that name over a checkpoint or an artifact."""
    if name == "bandwidth":
        return Reading()
    if name.startswith("smelt-"):
        return Smelt(folder, prompt, gen)
    if name in ("hf-eager", "hf-compile"):
        return Transformers(folder, prompt, gen, name == "hf-compile")
    if name in PEERS:
        from . import peer_contenders

        return peer_contenders.make(name, folder, prompt, gen)
    sys.exit(f"no contender {name}; there are {', '.join([*NAMES, *PEERS])}")

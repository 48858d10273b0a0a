"""Measure an artifact: prefill and decode speed beside the memory bandwidth of the same minutes.

One decode step reads every weight once, so on a CPU the memory's bandwidth bounds it. The fraction
of the bound that is reached only means something when both are measured together: other processes
and the processor's clock change within a minute. So every round times a read of a large buffer and
then a prompt with its answer, and the medians over the rounds are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from . import machine
from .engine import Engine
from .errors import SmeltError, UserError
from .llm import LLM, load
from .sampling_params import SamplingParams

# The buffer is read once a timing; it must not fit into any cache.
BUFFER_BYTES = 1 << 30
CACHES_IN_BUFFER = 4
READS = 3


@dataclass(frozen=True)
class Round:
    """One batch of prompts and their answers. Seconds; tokens over all sequences."""

    prefill_s: float
    decode_s: float
    ttft_s: float
    prefill_tokens: int
    decode_tokens: int

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s


@dataclass(frozen=True)
class Measurement:
    """Medians over the rounds; what each field means is said here and by `smelt bench --help`.

    prefill_tokens_per_s, decode_tokens_per_s: over the whole batch. ttft_s: from the request to its
    first token. load_s: opening the artifact, importing torch not counted. peak_rss_bytes: of the
    process, mapped weights included, the bandwidth buffer not. weight_bytes_per_token: weights one
    decode step reads. bound_fraction: bytes of weights read a second, of what could be read.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_s: float
    load_s: float
    peak_rss_bytes: int
    weight_bytes_per_token: int
    read_bandwidth_bytes_per_s: float
    bound_fraction: float


class Bandwidth:
    """A buffer far larger than the caches, and how fast all threads together read it.

    nbytes: its size; by default 1 GiB or four times the last cache, at most a quarter of the free
    memory. It is read by torch's own threads, as many as the model's kernels use.
    """

    def __init__(self, nbytes: int | None = None) -> None:
        if nbytes is None:
            wanted = max(BUFFER_BYTES, CACHES_IN_BUFFER * machine.last_level_cache())
            nbytes = max(1 << 20, min(wanted, machine.memory()[1] // 4))
        # Written once, so that every page exists: an untouched one is read from the zero page.
        self._buffer = torch.ones(nbytes // 4, dtype=torch.float32)

    def measure(self) -> float:
        """Bytes a second, the best of a few reads: nothing can make a read too fast."""
        best = 0.0
        for _ in range(READS):
            started = time.perf_counter()
            self._buffer.sum()
            best = max(best, self._buffer.nbytes / (time.perf_counter() - started))
        return best


def bench(
    folder: Path,
    *,
    prompt: int = 128,
    gen: int = 128,
    batch: int = 1,
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    opener: Callable[..., LLM] = load,
) -> Measurement:
    """Open the artifact and measure `rounds` rounds of `batch` random prompts of `prompt` tokens.

    gen: tokens generated for each; end tokens are ignored. progress(done, total) counts rounds,
    the warm-up included. opener: opens the folder, `smelt.load` for one that may need rebuilding.
    Raises UserError for sizes the model or its cache cannot hold.
    """
    for flag, value, least in (("prompt", prompt, 1), ("gen", gen, 2), ("batch", batch, 1)):
        if value < least:
            raise UserError(f"--{flag} is {value}: give {least} or more")
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: give 1 or more")
    report = progress or (lambda done, total: None)
    started = time.perf_counter()
    with opener(folder, kv_cache_tokens=batch * _blocks_of(prompt + gen)) as llm:
        load_s = time.perf_counter() - started
        weight_bytes = _weight_bytes(llm)
        _check(llm.engine, prompt, gen, batch)
        report(0, rounds + 1)
        # Also where the peak of memory is found: the bandwidth's buffer comes after it.
        run_round(llm.engine, prompt, gen, batch, seed)
        peak = machine.peak_memory()
        bandwidth = Bandwidth()
        report(1, rounds + 1)
        speeds: list[float] = []
        done: list[Round] = []
        for index in range(rounds):
            speeds.append(bandwidth.measure())
            done.append(run_round(llm.engine, prompt, gen, batch, seed + 1 + index))
            report(index + 2, rounds + 1)
    decode = median(r.decode_tokens_per_s for r in done)
    read = median(speeds)
    return Measurement(
        prefill_tokens_per_s=median(r.prefill_tokens_per_s for r in done),
        decode_tokens_per_s=decode,
        ttft_s=median(r.ttft_s for r in done),
        load_s=load_s,
        peak_rss_bytes=peak,
        weight_bytes_per_token=weight_bytes,
        read_bandwidth_bytes_per_s=read,
        bound_fraction=weight_bytes * decode / batch / read,
    )


def run_round(engine: Engine, prompt: int, gen: int, batch: int = 1, seed: int = 0) -> Round:
    """Answer `batch` random prompts greedily; prefill ends with the last prompt's first token.

    Tokens that early sequences generate before that are in neither rate.
    """
    if engine.has_work:
        raise SmeltError("the engine has other requests: measure it alone")
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, engine.program.vocab_size, (batch, prompt), generator=make).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=gen, ignore_eos=True)
    started = time.perf_counter()
    # A salt of its own: nothing of an earlier round's prompts is found in the cache.
    salt = object()
    waiting = {engine.add_request(tokens, params, salt=salt) for tokens in ids}
    firsts: list[float] = []
    decoded = 0
    prefilled = started
    while engine.has_work:
        counting = not waiting
        for output in engine.step():
            if output.error is not None:
                raise SmeltError(f"a step failed: {output.error}") from output.error
            decoded += len(output.token_ids) if counting else 0
            if output.token_ids and output.id in waiting:
                waiting.remove(output.id)
                firsts.append(time.perf_counter() - started)
        if not counting and not waiting:
            prefilled = time.perf_counter()
    return Round(
        prefill_s=prefilled - started,
        decode_s=time.perf_counter() - prefilled,
        ttft_s=median(firsts),
        prefill_tokens=batch * prompt,
        decode_tokens=decoded,
    )


def _blocks_of(tokens: int, block: int = 64) -> int:
    """Rounded up, so that every sequence has its blocks whatever their size up to `block`."""
    return -(-tokens // block) * block


def _weight_bytes(llm: LLM) -> int:
    assert llm.artifact is not None
    manifest = llm.artifact.manifest
    found = manifest.memory.get("weight_bytes_per_token")
    if not found:
        raise UserError(
            f"{llm.artifact.folder}: the manifest does not say how many bytes of weights a step "
            "reads; compile the model again with this version of smelt"
        )
    return int(found)


def _check(engine: Engine, prompt: int, gen: int, batch: int) -> None:
    if prompt + gen > engine.context:
        raise UserError(
            f"--prompt {prompt} and --gen {gen} make {prompt + gen} tokens, the model's context is "
            f"{engine.context}: give fewer"
        )
    if prompt + gen > engine.capacity:
        raise UserError(f"the KV cache holds {engine.capacity} tokens: give a shorter --prompt")
    limit = engine.scheduler.max_running
    if batch > limit:
        raise UserError(f"--batch {batch}: this artifact runs at most {limit} sequences at once")

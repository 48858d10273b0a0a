"""Serving speed against transformers on one machine, all in one process, interleaved.

    python -m benchmarks.throughput                       # the 135 M shape, about 20 minutes
    python -m benchmarks.throughput --shape tiny --rounds 1 --requests 8

Measured, medians over the rounds:

    throughput   `--requests` prompts of 128 random tokens, 64 generated each: smelt with all at
                 once; transformers' `generate` one at a time (timed on `--alone` of them, which
                 have the same length) and its continuous batching (`generate_batch`) with all.
    background   the longest step of 8 sequences that decode while a prompt of 4096 tokens is
                 prefilled beside them, over the time of one chunk alone.
    chat         the time to the first token of a second turn behind a system prompt of 1500 tokens,
                 with and without the prefix cache.
    scheduler    the time spent outside the model in a step of 64 sequences, by part.

Threads are torch's default for everybody. Results go to benchmarks/results as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import smelt
from smelt.runtime.llm import LLM
from smelt.runtime.sampling_params import SamplingParams

from .shapes import SHAPES, artifact, checkpoint

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT, GEN, SYSTEM, BACKGROUND = 128, 64, 1500, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="S8k")
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--alone", type=int, default=6)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    folder = artifact(shape, given.quant)
    tokens = given.requests * (PROMPT + GEN + 16) + BACKGROUND + 2 * SYSTEM
    llm = smelt.load(folder, kv_cache_tokens=min(tokens, 65536))
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "shape": given.shape,
        "quant": given.quant,
        "requests": given.requests,
        "machine": {"processor": platform.processor(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "smelt": smelt.__version__},
    }
    peer = Peer(checkpoint(shape)) if given.peers else None
    if peer is not None:
        result["versions"]["transformers"] = peer.version
    result["throughput"] = throughput(llm, peer, given.requests, given.alone, given.rounds)
    print(json.dumps(result["throughput"], indent=1), flush=True)
    result["scheduler"] = scheduler(llm, given.requests)
    print(json.dumps(result["scheduler"], indent=1), flush=True)
    if shape.context > BACKGROUND:
        result["background"] = [background(llm, seed) for seed in range(given.rounds)]
        result["chat"] = chat(llm, folder, given.rounds)
        print(json.dumps({k: result[k] for k in ("background", "chat")}, indent=1), flush=True)
    out = given.out or RESULTS / f"throughput-{time.strftime('%Y-%m-%d')}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)


def prompts(count: int, length: int, size: int, seed: int) -> list[list[int]]:
    make = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(2, size, (count, length), generator=make).tolist()
    return found


class Peer:
    """transformers in the checkpoint's bf16: alone with sdpa, batched with its paged attention."""

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers import AutoModelForCausalLM

        self.version = transformers.__version__
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.batched = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    def alone(self, wanted: list[list[int]]) -> float:
        """Generated tokens a second of one request after another."""
        began = time.perf_counter()
        for ids in wanted:
            self.model.generate(
                torch.tensor([ids]), max_new_tokens=GEN, min_new_tokens=GEN, do_sample=False
            )
        return len(wanted) * GEN / (time.perf_counter() - began)

    def together(self, wanted: list[list[int]]) -> float:
        """Generated tokens a second of transformers' continuous batching."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=GEN, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        began = time.perf_counter()
        found = self.batched.generate_batch(inputs=wanted, generation_config=config)
        seconds = time.perf_counter() - began
        made = sum(len(output.generated_tokens) for output in found.values())
        assert made == len(wanted) * GEN, f"continuous batching made {made} tokens"
        return made / seconds


def throughput(llm: LLM, peer: Peer | None, count: int, alone: int, rounds: int) -> dict[str, Any]:
    """Generated tokens a second of each, every single round, and ratios of the medians."""
    size = llm.engine.program.vocab_size
    params = SamplingParams(max_tokens=GEN, ignore_eos=True)
    rates: dict[str, list[float]] = {"smelt": []}
    if peer is not None:
        rates |= {"generate": [], "generate_batch": []}
        # What the first run compiles or allocates is not its speed.
        peer.alone(prompts(1, PROMPT, size, 99))
        peer.together(prompts(4, PROMPT, size, 98))
    llm.generate(prompts(2, PROMPT, size, 97), params)
    for seed in range(rounds):
        wanted = prompts(count, PROMPT, size, seed)
        began = time.perf_counter()
        outputs = llm.generate(wanted, params)
        seconds = time.perf_counter() - began
        made = sum(len(output.token_ids) for output in outputs)
        assert made == count * GEN
        rates["smelt"].append(made / seconds)
        if peer is not None:
            rates["generate"].append(peer.alone(wanted[:alone]))
            rates["generate_batch"].append(peer.together(wanted))
    found: dict[str, Any] = {"tokens_per_s": rates}
    for name in rates:
        if name != "smelt":
            found[f"smelt_over_{name}"] = median(rates["smelt"]) / median(rates[name])
    return found


def background(llm: LLM, seed: int) -> dict[str, float]:
    """How long a decode step takes while a long prompt is prefilled beside it."""
    engine, size = llm.engine, llm.engine.program.vocab_size
    chunk = engine.scheduler.max_tokens
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    for ids in prompts(8, PROMPT, size, 100 + seed):
        engine.add_request(ids, params)
    while engine.metrics.generated_tokens == 0 or engine.scheduler.waiting:
        engine.step()
    plain = [_timed(engine.step) for _ in range(20)]
    # A chunk alone, deep in a context as long as the prompt's: what one step may add.
    long = prompts(1, BACKGROUND, size, 200 + seed)[0]
    before = engine.metrics.prefilled_tokens
    engine.add_request(long, SamplingParams(max_tokens=1))
    beside = []
    while engine.metrics.prefilled_tokens - before < BACKGROUND:
        beside.append(_timed(engine.step))
    for number in list(engine._alive):
        engine.abort(number)
    while engine.has_work:
        engine.step()
    engine.add_request(prompts(1, BACKGROUND, size, 300 + seed)[0], SamplingParams(max_tokens=1))
    alone = []
    while engine.has_work:
        alone.append(_timed(engine.step))
    return {
        "chunk_tokens": chunk,
        "decode_step_s": median(plain),
        "longest_step_beside_s": max(beside),
        "longest_chunk_alone_s": max(alone),
        # At most 1 plus noise: a step with a chunk is not longer than the step and the chunk.
        "longest_over_step_and_chunk": max(beside) / (median(plain) + max(alone)),
    }


def chat(llm: LLM, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of the second turn, with what the first one left and without."""
    size = llm.engine.program.vocab_size
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    without = smelt.load(folder, kv_cache_tokens=4 * SYSTEM, prefix_cache=False)
    times: dict[str, list[float]] = {"with": [], "without": []}
    for seed in range(rounds):
        system = prompts(1, SYSTEM, size, 400 + seed)[0]
        turns = prompts(2, 40, size, 500 + seed)
        for name, each in (("with", llm), ("without", without)):
            first = each.generate([system + turns[0]], params)[0]
            second = each.generate([system + turns[0] + first.token_ids + turns[1]], params)[0]
            times[name].append(second.ttft_s)
    without.close()
    return {"ttft_s": times, "sooner": median(times["without"]) / median(times["with"])}


def scheduler(llm: LLM, count: int) -> dict[str, float]:
    """Shares of a decode step of `count` sequences: planning and commit, batch, model, the rest."""
    engine = llm.engine
    spent: dict[str, float] = {"scheduler": 0.0, "batch": 0.0, "model": 0.0}

    def watch(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                spent[name] += time.perf_counter() - began

        setattr(owner, method, timed)

    size = engine.program.vocab_size
    for ids in prompts(count, PROMPT, size, 600):
        engine.add_request(ids, SamplingParams(max_tokens=GEN, ignore_eos=True))
    while engine.scheduler.waiting or any(s.pending > 1 for s in engine.scheduler.running):
        engine.step()
    for method in ("plan", "commit"):
        watch(engine.scheduler, method, "scheduler")
    watch(engine.builder, "build", "batch")
    watch(engine.program, "run", "model")
    steps = 30
    total = sum(_timed(engine.step) for _ in range(steps))
    for owner, method in (
        (engine.scheduler, "plan"),
        (engine.scheduler, "commit"),
        (engine.builder, "build"),
        (engine.program, "run"),
    ):
        delattr(owner, method)
    for number in list(engine._alive):
        engine.abort(number)
    while engine.has_work:
        engine.step()
    shares = {name: seconds / total for name, seconds in spent.items()}
    return {"step_s": total / steps, **shares, "rest": 1 - sum(shares.values())}


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

"""What the formats of the KV cache cost in quality and take in memory, as a table and as JSON.

    python -m benchmarks.kv_cache                    the checkpoints of ../shared/data, and the demo
    python -m benchmarks.kv_cache --model DIR --text EVAL.txt
    python -m benchmarks.kv_cache --docs docs/quantization.md     and replace that page's table

Each model runs in float32 through the whole pipeline, with weights that are not quantized, so that
what is measured is the cache alone. The text is cut into windows of --context tokens that do not
overlap; each is prefilled in chunks of --chunk tokens, as the engine would. Every key and value is
read back from the cache, so the size of the chunks does not matter. The first token of a window is
not scored. KL and top-1: against the model with a float32 cache, at every position. "a token":
bytes of the cache that one token takes; of `auto`, where the model computes in 16 bits. Needles
are those of `smelt eval --needle`: the demo model's own for it, `repeat` for the others; found and
gain are means over prompts of half and all of the context at five depths.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.trace import export, program_from_export
from smelt.compiler.weights import ModuleSource
from smelt.models.demo import needle as demo_needle
from smelt.passes.program import Program
from smelt.runtime.batch import no_tree
from smelt.runtime.haystack import repeat
from smelt.runtime.kernels import build
from smelt.runtime.needle import SHORTEST, Retrieval, retrieval
from smelt.runtime.ops.cache_format import CACHE_FORMATS
from smelt.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SMELT_DATA") or ROOT.parent / "shared" / "data")
DEMO = ROOT / "models" / "demo" / "smelt-demo"
CHECKPOINTS = ("stories260K", "llama2xs270K", "babyllama361")
BEGIN, END = "<!-- kv-cache:begin -->", "<!-- kv-cache:end -->"


@dataclass(frozen=True)
class Row:
    """One line of the table. token_bytes: of the cache, a token, where `auto` is 16 bits.

    needle: its kind; found, gain: means over `cells` (`smelt.runtime.needle.Cell`).
    """

    model: str
    format: str
    head_size: int
    perplexity: float
    kl: float
    top1: float
    token_bytes: int
    needle: str
    found: float
    gain: float
    cells: list[dict[str, float]]


def step_program(module: Any, kv_cache: str) -> Program:
    """The lowered program of a model, weights not quantized."""
    program = program_from_export(export(module), module, module.config)
    return PassManager(pipeline(PipelineConfig(kv_cache=kv_cache))).run(program)


def steps(program: Program, ids: torch.Tensor, chunk: int) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of the steps that prefill `ids` [T] in chunks; caches are carried along."""
    spec = program.caches
    assert spec is not None
    blocks = -(-len(ids) // spec.block_size)
    caches = {f"kv_cache_{i}": cache for i, cache in enumerate(spec.allocate(blocks))}
    for first in range(0, len(ids), chunk):
        end = min(first + chunk, len(ids))
        at = torch.arange(first, end)
        values = {
            "input_ids": ids[first:end],
            "position_ids": at,
            "query_start": torch.tensor([0, end - first], dtype=torch.int32),
            "seq_lens": torch.tensor([end], dtype=torch.int32),
            "logits_rows": torch.arange(end - first),
            "tree_mask": no_tree(end - first),
        }
        for group in range(len(spec.groups)):
            values[f"slot_mapping_{group}"] = at
            values[f"block_tables_{group}"] = torch.arange(blocks, dtype=torch.int32)[None]
        yield {**values, **caches}


Weights = dict[str, torch.Tensor]


def logits(program: Program, weights: Weights, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """float32 [T, V] of a sequence [T]."""
    parts = []
    for values in steps(program, ids, chunk):
        result = program.run(values, weights)
        parts.append(result[0] if isinstance(result, list | tuple) else result)
    return torch.cat(parts).float()


def is_demo(folder: Path) -> bool:
    return folder.resolve().parent == DEMO.parent


def needles(
    folder: Path, program: Program, weights: Weights, context: int, text: str, trials: int
) -> Retrieval:
    """The needle test on a program; a prompt is prefilled in one step."""

    def score(prompts: list[list[int]], last: list[int]) -> list[torch.Tensor]:
        return [
            logits(program, weights, torch.tensor(ids), len(ids))[-count:]
            for ids, count in zip(prompts, last, strict=True)
        ]

    haystack = demo_needle.haystack() if is_demo(folder) else repeat(text)
    lengths = tuple(n for n in (context // 2, context) if n >= SHORTEST)
    return retrieval(haystack, Tokenizer(folder), score, lengths, trials=trials)


def token_bytes(program: Program) -> int:
    spec = program.caches
    assert spec is not None
    return (replace(spec, dtype="bfloat16") if spec.format == "auto" else spec).bytes_per_token()


def measure(folder: Path, text: str, given: argparse.Namespace) -> Iterator[Row]:
    """Every format on one model, the unquantized first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    context = min(given.context, module.config.max_position_embeddings)
    enough = 16 * context * given.windows  # characters: no tokenizer here averages more a token
    ids = AutoTokenizer.from_pretrained(folder).encode(text[:enough])
    windows = [
        torch.tensor(ids[at : at + context]) for at in range(0, len(ids) - context + 1, context)
    ][: given.windows]
    reference: list[torch.Tensor] = []
    for name in CACHE_FORMATS:
        program = step_program(module, name)
        weights = dict(program.weights.materialize(program.used_weights(), ModuleSource(module)))
        found = [logits(program, weights, ids, given.chunk).log_softmax(-1) for ids in windows]
        reference = reference or found
        loss, kl, same, tokens = 0.0, 0.0, 0, 0
        for p, q, window in zip(reference, found, windows, strict=True):
            loss -= float(q[:-1].gather(1, window[1:, None]).sum())
            kl += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(window)
        asked = needles(folder, program, weights, context, text, given.needles)
        assert program.caches is not None
        yield Row(
            folder.name,
            name,
            program.caches.head_sizes[0],
            math.exp(loss / (tokens - len(windows))),
            kl / tokens,
            same / tokens,
            token_bytes(program),
            "demo" if is_demo(folder) else "repeat",
            asked.mean("found"),
            asked.mean("gain"),
            [asdict(cell) for cell in asked.cells],
        )


def table(rows: list[Row]) -> str:
    plain = {r.model: r for r in rows if r.format == "auto"}
    lines = [
        "| model | head size | KV cache | a token | perplexity | KL to a float32 cache | top-1 "
        "| needle | found | gain |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        base = plain[r.model]
        size = f"{r.token_bytes} B, {base.token_bytes / r.token_bytes:.2f}x fewer"
        moved = f"{r.perplexity:.3f} ({100 * (r.perplexity / base.perplexity - 1):+.2f} %)"
        if r is base:
            size, moved = f"{r.token_bytes} B", f"{r.perplexity:.3f}"
        lines.append(
            f"| {r.model} | {r.head_size} | {r.format} | {size} | {moved} | {r.kl:.5f} "
            f"| {100 * r.top1:.1f} % | {r.needle} | {100 * r.found:.0f} % | {r.gain:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, action="append", help="a folder; may be given again")
    parser.add_argument(
        "--text", type=Path, help="default: TinyStories; the demo's own text for it"
    )
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64, help="tokens of a prefill step")
    parser.add_argument("--windows", type=int, default=64, help="at most so many")
    parser.add_argument("--needles", type=int, default=8, help="prompts a length and depth")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "kv_cache.json"
    )
    parser.add_argument("--docs", type=Path, help="a page whose table is replaced")
    given = parser.parse_args()
    build.load()
    rows: list[Row] = []
    stories = DATA / "texts" / "tinystories_valid.txt"
    for folder in given.model or [*(DATA / "models" / name for name in CHECKPOINTS), DEMO]:
        own = folder.parent / "heldout.txt"
        path = given.text or (own if own.is_file() else stories)
        for row in measure(folder, path.read_text(encoding="utf-8"), given):
            rows.append(row)
            print(table(rows).split("\n")[-1], flush=True)
    print(table(rows))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "rows": [asdict(row) for row in rows],
        "context": given.context,
        "chunk": given.chunk,
        "windows": given.windows,
        "needles": given.needles,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    if given.docs:
        head, _, rest = given.docs.read_text(encoding="utf-8").partition(BEGIN)
        tail = rest.partition(END)[2]
        given.docs.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()

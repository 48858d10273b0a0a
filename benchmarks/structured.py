"""What structured output costs: compiling a grammar, and filling a mask for each token.

    python -m benchmarks.structured                       the demo's vocabulary
    python -m benchmarks.structured --tokenizer DIR --vocab-size 50304 --end 50256

Random answers follow each grammar without a model. compile: the first time, in a process that has
started already; load and matcher included. fill: `Matcher.fill`, the median and the 99th percentile
over all tokens; step: `prepare` and the masking within `process` for --rows requests, median, what
is left if the model takes no time at all; accept: a token taken. Microseconds unless named.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smelt.runtime.errors import UserError
from smelt.runtime.masks import prepare, unpack
from smelt.runtime.sampler import Row, SamplerState
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.structured import Structured
from smelt.runtime.structured_compiler import CompiledGrammar, GrammarCompiler
from smelt.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo" / "smelt-demo"
BACKENDS = ("xgrammar", "llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
}
SPECS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": PERSON},
    "any object": {"json_object": True},
    "regex": {"regex": r"\d{4}-\d{2}-\d{2}T[a-z]{1,200}"},
    "choice of 100": {"choice": [f"option number {i}" for i in range(100)]},
    "grammar": {"grammar": 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"'},
}


@dataclass(frozen=True)
class Line:
    """One line of the table; times as the module says."""

    backend: str
    kind: str
    compile_ms: float
    tokens: int
    fill: float
    fill_99: float
    accept: float
    step: float


def measure(
    compiler: GrammarCompiler, backend: str, kind: str, size: int, ends: list[int], options: Any
) -> Line:
    """Compile one description and follow it."""
    start = time.perf_counter()
    grammar = compiler.compile(Structured(**SPECS[kind], backend=backend))
    grammar.matcher()
    compiling = time.perf_counter() - start
    fills, accepts = follow(grammar, size, ends, options.tokens)
    return Line(
        backend,
        kind,
        compiling * 1e3,
        len(fills),
        statistics.median(fills) * 1e6,
        sorted(fills)[int(len(fills) * 0.99)] * 1e6,
        statistics.median(accepts) * 1e6,
        step(grammar, size, ends, options) * 1e6,
    )


def follow(
    grammar: CompiledGrammar, size: int, ends: list[int], count: int
) -> tuple[list[float], list[float]]:
    """Seconds of each fill and of each accept, over answers of `count` tokens altogether."""
    rng = random.Random(0)
    mask = torch.zeros((size + 31) // 32, dtype=torch.int32)
    fills, accepts = [], []
    matcher = grammar.matcher()
    for _ in range(count):
        if matcher.finished:
            matcher = grammar.matcher()
        start = time.perf_counter()
        matcher.fill(mask)
        fills.append(time.perf_counter() - start)
        found = unpack(mask[None], size)[0].nonzero().flatten().tolist()
        token = rng.choice([t for t in found if t not in ends] or found)
        start = time.perf_counter()
        matcher.accept([token])
        accepts.append(time.perf_counter() - start)
    return fills, accepts


def step(grammar: CompiledGrammar, size: int, ends: list[int], options: Any) -> float:
    """Seconds that masks add to a step of --rows requests, if nothing runs meanwhile."""
    params, device = SamplingParams(), torch.device("cpu")
    rows = [
        Row(SamplerState(params, 1, ends, matcher=grammar.matcher()), [0])
        for _ in range(options.rows)
    ]
    scores = torch.zeros(options.rows, size)
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        prepare(rows, size, device).apply(scores)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def table(lines: list[Line]) -> str:
    head = ("backend", "what", "compile, ms", "tokens", "fill", "99%", "accept", "step")
    rows = [
        (
            line.backend,
            line.kind,
            f"{line.compile_ms:.1f}",
            str(line.tokens),
            f"{line.fill:.1f}",
            f"{line.fill_99:.1f}",
            f"{line.accept:.1f}",
            f"{line.step:.0f}",
        )
        for line in lines
    ]
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, default=DEMO)
    parser.add_argument("--vocab-size", type=int, help="of the logits, otherwise the tokenizer's")
    parser.add_argument("--end", type=int, action="append", help="end tokens, otherwise its own")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    tokenizer = Tokenizer(options.tokenizer)
    size = options.vocab_size or tokenizer.vocab_size
    own = tokenizer.eos_token_id
    ends = options.end or ([] if own is None else [own])
    lines = []
    for backend in BACKENDS:
        compiler = GrammarCompiler(tokenizer, size, ends)
        try:
            compiler.compile(Structured(choice=["start"], backend=backend))
        except UserError as error:
            print(f"{backend} is left out: {error}")
            continue
        lines += [measure(compiler, backend, kind, size, ends, options) for kind in SPECS]
        compiler.close()
    print(
        f"{size} tokens, {options.rows} rows a step, {torch.get_num_threads()} threads of torch\n"
    )
    print(table(lines))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Quality of every quantization scheme on trained checkpoints, as a table and as JSON.

    python -m benchmarks.quality                          the demo model and ../shared/data
    python -m benchmarks.quality --model DIR --text EVAL.txt --calib CALIB.txt
    python -m benchmarks.quality --scheme fp32 --scheme rtn-int8         only these

Each model runs in float32 through the graph that the quantization passes transform, so that what is
measured is the loss of the scheme and nothing else. The text is cut into windows of --context
tokens that do not overlap; the first token of a window is not scored. perplexity: exp of the mean
negative log-likelihood of a token; bits/char: the same loss over the characters of the scored text,
comparable between vocabularies; KL and top-1: against the float32 logits at every position. The
demo model also answers its held-out questions with every scheme: greedy decoding, exact match.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smelt.compiler.calibration_data import load_calibration
from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.quantization import stage_for
from smelt.compiler.trace import export, program_from_export
from smelt.compiler.weights import ModuleSource
from smelt.models.demo.evaluate import scored_accuracy
from smelt.passes.program import Program
from smelt.passes.quantize import QuantSpec
from smelt.runtime.batch import no_tree

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SMELT_DATA") or ROOT.parent / "shared" / "data")
DEMO = ROOT / "models" / "demo"
STORIES = tuple(DATA / "texts" / f"tinystories_{part}.txt" for part in ("valid", "train"))
# A model's folder, the text it is scored on, the text it is calibrated on.
SUBJECTS = (
    (DATA / "models" / "stories260K", *STORIES),
    (DATA / "models" / "babyllama361", *STORIES),
    (DEMO / "smelt-demo", DEMO / "heldout.txt", DEMO / "calibration.txt"),
)
METHODS = ("rtn", "awq", "gptq")
SCHEMES = (
    QuantSpec("rtn", "int8"),
    *(QuantSpec(method, "int4", size) for size in (32, 64, 128) for method in METHODS),
    *(QuantSpec(method, "int3", size) for size in (32, 128) for method in METHODS),
    QuantSpec("rtn", "int2", 32),
    *(QuantSpec("mixed", bits=bits) for bits in (3.5, 4.2, 4.5)),
    QuantSpec("smoothquant", alpha=0.0),
    QuantSpec("smoothquant"),
    QuantSpec("smoothquant", alpha=0.0, activations="static"),
    QuantSpec("smoothquant", activations="static"),
    QuantSpec("rtn", "fp8"),
    QuantSpec("fp8"),
    QuantSpec("fp8", activations="static"),
    QuantSpec("fp8", group_size=128),
)
# Models that answer the demo's questions.
ANSWERING = ("smelt-demo", "smelt-demo-draft")


@dataclass(frozen=True)
class Row:
    """One line of the table. weight_bytes: linears as stored, everything else at 16 bits.

    accuracy: of the demo model, by task.
    """

    model: str
    scheme: str
    perplexity: float
    bits_per_character: float
    kl: float
    top1: float
    weight_bytes: int
    quantize_s: float
    accuracy: dict[str, float] | None = None


@dataclass
class Subject:
    """A model with the windows it is scored on and its own logits there.

    questions: of each of the demo's tasks, 0 for models that do not know them.
    """

    name: str
    module: Any
    source: ModuleSource
    tokenizer: Any
    questions: int
    windows: list[torch.Tensor]
    characters: float
    reference: list[torch.Tensor]


def run_passes(program: Program, first: str | None, end: str) -> Program:
    """The default pipeline's passes from `first` on, up to `end` and without it."""
    stages = pipeline(PipelineConfig())
    names = [stage.pass_.name for stage in stages]
    start = 0 if first is None else names.index(first)
    PassManager(stages[start : names.index(end)]).run(program)
    return program


def semantic(module: Any) -> Program:
    """The program at the point where quantization runs."""
    program = program_from_export(export(module), module, module.config)
    return run_passes(program, None, "keep-logits-rows")


Weights = dict[str, torch.Tensor]


def weights_of(program: Program, source: ModuleSource) -> Weights:
    return dict(program.weights.materialize(program.used_weights(), source))


def run(program: Program, weights: Weights, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities float32 [T, V] of each window."""
    out = []
    for ids in windows:
        logits = program.run({"input_ids": ids, "position_ids": torch.arange(len(ids))}, weights)
        out.append(_first(logits).float().log_softmax(-1))
    return out


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, list | tuple) else result


def packed(program: Program, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    """The inputs of one step that reads whole sequences, each with cache blocks of its own."""
    spec = program.caches
    assert spec is not None
    size = spec.block_size
    lengths = [len(tokens) for tokens in sequences]
    taken = [-(-length // size) for length in lengths]
    first = [sum(taken[:i]) for i in range(len(taken))]
    tables = torch.zeros(len(taken), max(taken), dtype=torch.int32)
    for row, (start, count) in enumerate(zip(first, taken, strict=True)):
        tables[row, :count] = torch.arange(start, start + count)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    slots = [torch.arange(n) + at * size for at, n in zip(first, lengths, strict=True)]
    values = {
        "input_ids": torch.tensor([token for tokens in sequences for token in tokens]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "query_start": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "logits_rows": torch.arange(starts[-1]),
        "tree_mask": no_tree(starts[-1]),
    }
    for group in range(len(spec.groups)):
        values[f"slot_mapping_{group}"] = torch.cat(slots)
        values[f"block_tables_{group}"] = tables
    caches = enumerate(spec.allocate(sum(taken)))
    return {**values, **{f"kv_cache_{i}": cache for i, cache in caches}}


def accuracy(of: Subject, program: Program) -> dict[str, float]:
    """The demo model's share of right answers, by task; `program` goes on to its cached form."""
    run_passes(program, "keep-logits-rows", "choose-providers")
    weights = weights_of(program, of.source)

    def predict(sequences: list[list[int]]) -> list[list[int]]:
        if not sequences:
            return []
        best = _first(program.run(packed(program, sequences), weights)).argmax(-1)
        return [part.tolist() for part in best.split([len(tokens) for tokens in sequences])]

    def encode(text: str) -> list[int]:
        return of.tokenizer.encode(text, add_special_tokens=False)

    return scored_accuracy(predict, encode, of.questions)


def stored_bytes(program: Program) -> int:
    """Bytes of the weights the graph reads, floating ones other than scales at 16 bits."""
    total = 0
    for name in program.used_weights():
        spec = program.weights.specs[name]
        scale = name.partition("@")[0].endswith((".scales", ".input_scale"))
        wide = spec.dtype.is_floating_point and spec.dtype.itemsize > 2 and not scale
        total += spec.nbytes * 2 // spec.dtype.itemsize if wide else spec.nbytes
    return total


def subject(
    folder: Path, text: Path, characters: int, context: int, tokenizer: Any, questions: int = 0
) -> Subject:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.encode(text.read_text(encoding="utf-8")[:characters])
    count = len(ids) // context
    windows = [torch.tensor(ids[i * context : (i + 1) * context]) for i in range(count)]
    scored = characters * count * (context - 1) / len(ids)
    source = ModuleSource(module)
    program = semantic(module)
    reference = run(program, weights_of(program, source), windows)
    return Subject(folder.name, module, source, tokenizer, questions, windows, scored, reference)


def measure(of: Subject, spec: QuantSpec | None, samples: Any) -> Row:
    """One scheme on one model. Without a spec: the float32 model itself."""
    program = semantic(of.module)
    started = time.perf_counter()
    if spec is not None:
        stage = stage_for(spec, samples, of.source)
        stage.pass_.run(program, stage.options)
        if stage.pass_.produces is not None:
            program.dialect = stage.pass_.produces
    seconds = time.perf_counter() - started
    weights = weights_of(program, of.source)
    found = of.reference if spec is None else run(program, weights, of.windows)
    loss, kl, same, tokens = 0.0, 0.0, 0, 0
    for p, q, ids in zip(of.reference, found, of.windows, strict=True):
        loss -= float(q[:-1].gather(1, ids[1:, None]).sum())
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(ids)
    scored = tokens - len(of.windows)
    return Row(
        of.name,
        spec.label() if spec else "fp32",
        math.exp(loss / scored),
        loss / math.log(2) / of.characters,
        kl / tokens,
        same / tokens,
        stored_bytes(program),
        round(seconds, 1),
        accuracy(of, program) if of.questions else None,
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| model | scheme | perplexity | bits/char | KL to fp32 | top-1 | weights, kB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.model} | {r.scheme} | {r.perplexity:.3f} | {r.bits_per_character:.4f} | {r.kl:.4f} "
        f"| {100 * r.top1:.1f} % | {r.weight_bytes / 1000:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def task_table(rows: list[Row]) -> str:
    """Accuracy in percent: a row a scheme, a column a task."""
    answered = [(row.scheme, row.accuracy) for row in rows if row.accuracy]
    names = list(answered[0][1])
    lines = [f"| scheme | mean | {' | '.join(names)} |", f"|---|{'---:|' * (len(names) + 1)}"]
    for scheme, scores in answered:
        mean = 100 * sum(scores.values()) / len(scores)
        cells = " | ".join(f"{100 * scores[name]:.0f}" for name in names)
        lines.append(f"| {scheme} | {mean:.1f} | {cells} |")
    return "\n".join(lines)


def write_into(docs: Path, marker: str, text: str) -> None:
    """Replace what stands between the markers of this name in `docs`."""
    begin, end = (f"<!-- {marker}:{which} -->" for which in ("begin", "end"))
    page = docs.read_text(encoding="utf-8")
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{docs} has no {begin} ... {end}")
    docs.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, action="append", help="a folder; may be given again")
    parser.add_argument("--text", type=Path, default=STORIES[0])
    parser.add_argument("--calib", type=Path, default=STORIES[1])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--characters", type=int, default=60_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--questions", type=int, default=64, help="of each task of the demo model")
    parser.add_argument("--scheme", action="append", help="by its label; may be given again")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json"
    )
    parser.add_argument("--docs", type=Path, help="a page whose table is replaced")
    given = parser.parse_args()
    rows: list[Row] = []
    chosen = [(folder, given.text, given.calib) for folder in given.model or ()]
    for folder, text, calib in chosen or SUBJECTS:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        questions = given.questions if folder.name in ANSWERING else 0
        of = subject(folder, text, given.characters, given.context, tokenizer, questions)
        calibration = load_calibration(calib, tokenizer, given.samples, given.context)
        for spec in (None, *SCHEMES):
            if given.scheme and (spec.label() if spec else "fp32") not in given.scheme:
                continue
            rows.append(measure(of, spec, calibration))
            print(table(rows[-1:]).split("\n")[-1], flush=True)
    print(table(rows))
    if any(row.accuracy for row in rows):
        print(task_table(rows))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "rows": [asdict(row) for row in rows],
        "texts": {
            folder.name: [text.name, calib.name] for folder, text, calib in chosen or SUBJECTS
        },
        "samples": given.samples,
        "characters": given.characters,
        "context": given.context,
        "questions": given.questions,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    if given.docs:
        write_into(given.docs, "quality", table(rows))
        if any(row.accuracy for row in rows):
            write_into(given.docs, "tasks", task_table(rows))


if __name__ == "__main__":
    main()

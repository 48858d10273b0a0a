"""Our AWQ, GPTQ and SmoothQuant beside llm-compressor's: same models, text, tokens and groups.

    make bench-peers-quality                            makes the environment and runs this
    python -m benchmarks.llm_compressor --python PYTHON [--model NAME] [--docs docs/quantization.md]

PYTHON belongs to an environment with llm-compressor, which wants an older transformers than smelt:

    python -m venv DIR && DIR/bin/pip install torch==2.13.0
    DIR/bin/pip install -r benchmarks/requirements-llm-compressor.txt

Both sides get the models of quality.py in float32 and the token ids of the same calibration
samples, leave lm_head alone, and give their logits on the same windows, which are compared with the
same float32 logits. llm-compressor runs with its defaults. Where the group size does not divide a
layer's features, both store one group a row. Not equal, and in its favour: its scales are float32
in a float32 model, where ours are the bfloat16 that the kernel multiplies with. Its searches take
minutes a scheme; --work DIR keeps what it gave, and another run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from smelt import __version__
from smelt.compiler.calibration_data import load_calibration
from smelt.passes.quantize import QuantSpec

from .quality import SUBJECTS, Subject, measure, subject, write_into

WORKER = Path(__file__).parent / "llm_compressor_worker.py"
MARKS = "llm-compressor"
SAMPLES, CONTEXT, CHARACTERS = 64, 256, 60_000
# Its default, and what its examples for int8 use.
STRENGTHS = (0.5, 0.8)
# The largest difference of a logit between the two unquantized models, for numerics alone.
SAME = 1e-3
SPECS = (
    *(QuantSpec(method, "int4", size) for method in ("awq", "gptq") for size in (32, 64, 128)),
    *(QuantSpec("gptq", "int3", size) for size in (32, 128)),
    QuantSpec("smoothquant"),
)


@dataclass(frozen=True)
class Row:
    """KL to the float32 logits, nats a token, of one scheme on one model."""

    model: str
    scheme: str
    ours: float
    theirs: float
    ours_top1: float
    theirs_top1: float

    @property
    def ahead(self) -> bool:
        return self.ours <= self.theirs


def requests() -> list[dict[str, Any]]:
    """What the worker is asked for; SmoothQuant once a strength, of which the better counts."""
    asked: list[dict[str, Any]] = []
    for spec in SPECS:
        if spec.method == "smoothquant":
            asked += [
                {"label": f"{spec.label()}-{s}", "method": spec.method, "strength": s}
                for s in STRENGTHS
            ]
            continue
        bits = int(spec.format.removeprefix("int"))
        form = {"method": spec.method, "bits": bits, "group_size": spec.group_size}
        asked.append({"label": spec.label(), **form})
    return asked


def run_worker(python: Path, model: Path, of: Subject, samples: Any, folder: Path) -> None:
    """Have the logits of every scheme in `folder`; those that are there stay."""
    tokens = {"calibration": torch.tensor(list(samples)), "windows": torch.stack(of.windows)}
    file = folder / "tokens.safetensors"
    if file.exists():
        there = load_file(file)
        if not all(torch.equal(tokens[name], there.get(name)) for name in tokens):
            raise SystemExit(f"{folder} holds results of other texts; name another --work")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tokens, file)
    (folder / "request.json").write_text(json.dumps({"model": str(model), "schemes": requests()}))
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [str(python), str(WORKER), str(folder)], stderr=log, cwd=folder, check=False
        )
    if done.returncode:
        tail = (folder / "log").read_text(errors="replace").splitlines()[-20:]
        raise SystemExit("\n".join([*tail, f"{python}: the worker failed with {done.returncode}"]))


def compare(of: Subject, folder: Path, label: str) -> tuple[float, float]:
    """(KL in nats a token, share of equal most likely tokens) of the worker's logits."""
    logits = load_file(folder / f"{label}.safetensors")["logits"]
    kl, same = 0.0, 0
    for p, found in zip(of.reference, logits, strict=True):
        q = found.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    count = logits.shape[0] * logits.shape[1]
    return kl / count, same / count


def check_same_model(of: Subject, folder: Path) -> None:
    """Stop where the two sides do not start from the same float32 logits."""
    theirs = load_file(folder / "original.safetensors")["logits"].log_softmax(-1)
    apart = float((theirs - torch.stack(of.reference)).abs().max())
    if apart > SAME:
        raise SystemExit(f"{of.name}: unquantized, the two differ by {apart} in a log-probability")


def table(rows: list[Row]) -> str:
    lines = [
        "| model | scheme | KL, smelt | KL, llm-compressor | top-1, smelt | llm-compressor |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.model} | {r.scheme} | {r.ours:.5f} | {r.theirs:.5f}{'' if r.ahead else ' (better)'} "
        f"| {100 * r.ours_top1:.1f} % | {100 * r.theirs_top1:.1f} % |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="of its environment")
    parser.add_argument("--model", choices=[folder.name for folder, *_ in SUBJECTS])
    parser.add_argument("--work", type=Path, help="keeps its logits, for a run that goes on")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--docs", type=Path, help="a page whose table is replaced")
    given = parser.parse_args()
    rows: list[Row] = []
    versions: dict[str, str] = {}
    for model, text, calib in SUBJECTS:
        if given.model not in (None, model.name):
            continue
        tokenizer = AutoTokenizer.from_pretrained(model)
        of = subject(model, text, CHARACTERS, CONTEXT, tokenizer)
        samples = load_calibration(calib, tokenizer, SAMPLES, CONTEXT)
        with tempfile.TemporaryDirectory(prefix="llm-compressor-") as name:
            folder = (given.work or Path(name)).absolute() / model.name
            run_worker(given.python.absolute(), model, of, samples, folder)
            versions = json.loads((folder / "versions.json").read_text())
            check_same_model(of, folder)
            for spec in SPECS:
                labels = [r["label"] for r in requests() if r["label"].startswith(spec.label())]
                theirs = min(compare(of, folder, label) for label in labels)
                ours = measure(of, spec, samples)
                rows.append(Row(of.name, spec.label(), ours.kl, theirs[0], ours.top1, theirs[1]))
                print(table(rows[-1:]).split("\n")[-1], flush=True)
    print(table(rows))
    record = {
        "date": date.today().isoformat(),
        "rows": [asdict(row) for row in rows],
        "smelt": __version__,
        "torch": torch.__version__,
        "llm_compressor": versions,
        "samples": SAMPLES,
        "context": CONTEXT,
        "characters": CHARACTERS,
        "strengths": STRENGTHS,
        "threads": torch.get_num_threads(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    if given.docs:
        write_into(given.docs, MARKS, table(rows))


if __name__ == "__main__":
    main()

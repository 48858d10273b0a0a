"""The user's own commands on real checkpoints: quality, size and speed of every scheme.

    python -m benchmarks.checkpoints --out benchmarks/results/checkpoints-DATE.json

For each model and scheme: perplexity and KL against fp32 eager transformers on the first `CHARS`
characters of the evaluation text, the size of the weights, and greedy decoding in tokens a second
beside transformers' eager `generate`, the two taking turns in one process (medians over `ROUNDS`).
The test models are tiny, so their speed shows overhead and not bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

import smelt
from smelt.compiler.evaluation import EagerModel
from smelt.runtime.evaluation import evaluate, prepare

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SMELT_DATA", ROOT.parent / "shared" / "data"))
STORIES = DATA / "texts" / "tinystories_valid.txt"
TRAINING = DATA / "texts" / "tinystories_train.txt"
DEMO = ROOT / "models" / "demo"
CHARS = 60_000
ROUNDS = 5
TOKENS = 96
GROUP = 64

# Name -> folder, evaluation text, calibration text, prompt.
MODELS = {
    "stories260K": (DATA / "models/stories260K", STORIES, TRAINING, "Once upon a time"),
    "babyllama361": (DATA / "models/babyllama361", STORIES, TRAINING, "Once upon a time"),
    "smelt-demo": (DEMO / "smelt-demo", DEMO / "heldout.txt", DEMO / "calibration.txt", "Hello"),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "int8 rtn": {"dtype": "bf16", "quant": "rtn", "format": "int8"},
    "int4 rtn": {"dtype": "bf16", "quant": "rtn", "format": "int4", "group_size": GROUP},
    "int4 awq": {"dtype": "bf16", "quant": "awq", "format": "int4", "group_size": GROUP},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=sorted(MODELS), help="one of the models")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (folder, text, calibration, prompt) in MODELS.items():
        if arguments.only not in (None, name):
            continue
        original = EagerModel(folder)
        content = text.read_text(encoding="utf-8")[:CHARS]
        for scheme, options in SCHEMES.items():
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                made = smelt.compile(folder, out, calib=str(calibration), **options)
                row = {"model": name, "scheme": scheme, "group": GROUP}
                row |= measure(out, original, content, prompt)
                row["weights_bytes"] = made.manifest.memory["weights_bytes"]  # type: ignore[union-attr]
                row["checkpoint_bytes"] = made.manifest.model["source_bytes"]  # type: ignore[union-attr]
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "smelt": smelt.__version__,
        "threads": torch.get_num_threads(),
        "characters": CHARS,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(out: Path, original: EagerModel, content: str, prompt: str) -> dict[str, Any]:
    """Quality and speed of one artifact."""
    with smelt.load(out, kv_cache_tokens=4096) as llm:
        windows = prepare(content, llm.tokenizer, context=llm.engine.context)
        found = evaluate(windows, llm.logits, original.logits)
        ids = llm.tokenizer.encode(prompt)
        params = smelt.SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        ours, theirs = [], []
        llm.generate([ids], params)
        for _ in range(ROUNDS):
            started = time.perf_counter()
            text = llm.generate([ids], params)[0].text
            ours.append(TOKENS / (time.perf_counter() - started))
            theirs.append(TOKENS / eager_seconds(original, ids))
    return {
        "perplexity": found.perplexity,
        "perplexity_fp32": found.perplexity_original,
        "bits_per_byte": found.bits_per_byte,
        "kl": found.kl,
        "top1": found.top1_agreement,
        "tokens_per_s": median(ours),
        "transformers_tokens_per_s": median(theirs),
        "text": text[:160],
    }


def eager_seconds(original: EagerModel, ids: list[int]) -> float:
    """Seconds of transformers' greedy generate for as many tokens."""
    started = time.perf_counter()
    original._model.generate(
        torch.tensor([ids]), min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

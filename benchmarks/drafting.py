"""What drafts are worth on the CPU: the demo model's tasks, with and without, in one run.

    python -m benchmarks.drafting --rounds 5

Compiles the demo model (bfloat16) and its drafts, answers the same held-out questions with and
without each draft in turn, and writes benchmarks/results/drafting.json: for each draft and length
the median over rounds of (time without / time with).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import smelt
from smelt.models.demo.acceptance import measure
from smelt.runtime import machine
from smelt.runtime.kernels import build

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo"


def artifacts(folder: Path) -> tuple[Path, dict[str, str]]:
    """(the model, drafts by name) compiled into `folder`."""
    model, draft = folder / "demo", folder / "draft"
    smelt.compile(str(DEMO / "smelt-demo"), model, features="final")
    smelt.compile(str(DEMO / "smelt-demo-draft"), draft)
    medusa = DEMO / "smelt-demo-medusa"
    return model, {"draft": str(draft), "n-gram": "ngram", "medusa": f"medusa:{medusa}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=4, help="questions of every task")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/drafting.json")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model, drafts = artifacts(Path(folder))
        for name, draft in drafts.items():
            lengths = (None, 3, 4, 6) if name == "draft" else (None,)
            for length in lengths:
                worth = measure(model, draft, length, given.each, given.rounds)
                row = {
                    "draft": name,
                    "tokens": length or "auto",
                    "speedup": round(worth.speedup, 3),
                    "rounds": [round(plain / drafted, 3) for plain, drafted in worth.seconds],
                    "tokens_per_s": round(worth.tokens / worth.seconds[-1][1]),
                    "accepted": round(worth.accepted / max(worth.drafted, 1), 3),
                    "tokens_per_drafted_step": round(worth.length, 2),
                    "steps": list(worth.steps),
                    "answers_changed": worth.different,
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    record = {
        "rows": rows,
        "isa": build.active_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": f"{machine.cpu_model()} ({platform.machine()})",
        "date": time.strftime("%Y-%m-%d"),
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""benchmarks/kernels_gpu.py: what is recorded stands, what changed is compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]

# In a process without the interpreter: it decorates kernels differently.
PROGRAM = """
from dataclasses import replace
from benchmarks import kernels_gpu as k
from smelt.runtime.kernels.gpu.tuning import Config
variant = next(k.variants("routing", 90))
first = k.key(variant, 90)
assert k.key(variant, 90) == first and k.key(variant, 80) != first
other = replace(variant, config=Config(variant.config.constants, num_warps=16))
assert k.key(other, 90) != first
assert k.key(replace(variant, hot=not variant.hot), 90) != first
assert len(k.recorded()) > 700
row = k.compile_one(("routing", 90, 0))
assert row["key"] == first and row["complaint"] is None and row["registers"] > 0, row
"""


def test_a_row_stands_until_what_it_was_made_from_changes() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

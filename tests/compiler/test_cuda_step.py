"""The CUDA step through AOTAutograd and Inductor's passes, without a CUDA device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("format_", "bounds"),
    [
        pytest.param("none", "few", marks=pytest.mark.slow),
        *(("int4", "few"), ("w8a8", "step")),
    ],
)
def test_no_cache_and_no_weight_is_copied(format_: str, bounds: str) -> None:
    """Kernels that change their arguments are functionalized and put back in place: where that
    fails, Inductor copies a cache, or every weight, in each step."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.fake_cuda", format_, bounds],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels"] >= 4 and found["functional"] == 0
    assert found["copied"] == []

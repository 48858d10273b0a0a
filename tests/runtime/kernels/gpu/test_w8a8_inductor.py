"""The 8-bit operators through AOTAutograd and Inductor's passes, without a CUDA device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[3]


def test_inductor_sees_the_kernels_and_copies_nothing() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.fake_w8a8"],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"kernels": 10, "functional": 0, "copied": []}

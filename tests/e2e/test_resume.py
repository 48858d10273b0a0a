"""A compilation that is killed while it calibrates goes on where it was."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.artifacts import DEMO, smelt

WAIT_S = 300.0


def test_a_killed_calibration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    arguments = ["compile", str(DEMO), "-o", str(tmp_path / "out"), "--quant", "gptq"]
    arguments += ["--calib-samples", "4", "--stop-after", "quantize-gptq"]
    journals = tmp_path / "cache" / "calibration"
    command = [sys.executable, "-m", "smelt.cli.app", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as killed:
        deadline = time.monotonic() + WAIT_S
        while len(list(journals.glob("*/*.safetensors"))) < 3:
            assert killed.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "it never came to calibrate"
            time.sleep(0.02)
        killed.kill()
    assert len(list(journals.glob("*/*.safetensors"))) >= 3
    done = smelt(*arguments)
    assert "going on with a calibration that was interrupted" in done.stderr
    assert list(journals.iterdir()) == [], "a calibration that is complete keeps nothing"

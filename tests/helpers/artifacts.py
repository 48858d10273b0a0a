"""Artifacts that several end-to-end tests share, compiled once a run by the user's own command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "models" / "demo" / "smelt-demo"


def smelt(
    *arguments: str | Path, stdin: str = "", code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the `smelt` command as a user would; fails the test on another exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "smelt.cli.app", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done


def one_line(text: str) -> str:
    """The single line that the command had to say, without torch's own warnings."""
    lines = [line for line in text.splitlines() if line.startswith("smelt: ")]
    progress = ("reading", "tracing", "calibrating", "saving", "writing", "compiling", "measuring")
    said = [line for line in lines if not line.removeprefix("smelt: ").startswith(progress)]
    assert len(said) == 1, text
    return said[0]

"""Type-check smelt over a throw-away tree of links, where the folders stand as they import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "compiler", "models", "passes", "runtime")


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "smelt"
        package.mkdir()
        for name in ("__init__.py", "lm_eval.py", "py.typed"):
            (package / name).symlink_to(ROOT / "smelt" / name)
        for folder in FOLDERS:
            (package / folder).symlink_to(ROOT / folder)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "smelt"]
        # The editable install answers for smelt too; the tree must be the only one mypy sees.
        environment = {**os.environ, "MYPYPATH": scratch}
        return subprocess.run(command, cwd=scratch, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

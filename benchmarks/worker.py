"""One contender in a process of its own, driven over pipes: a seed a line in, a JSON line out.

Processes keep thread pools, allocators and compiled code of the contenders apart. A worker that is
not asked sleeps on its pipe, so one at a time has the machine.

As a child: `python -m benchmarks.worker NAME FOLDER PROMPT GEN`, in the repository's root; with the
peers' python for those of them, so nothing here needs smelt.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from .contenders import make
from .shapes import ROOT, python_of


class Worker:
    """The parent's end. Raises RuntimeError with the child's exit code where it died."""

    def __init__(self, name: str, folder: Path, prompt: int, gen: int, log: Path) -> None:
        self.name = name
        self.log = log
        self._log = log.open("a")
        command = [
            python_of(name),
            "-m",
            "benchmarks.worker",
            name,
            str(folder),
            str(prompt),
            str(gen),
        ]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.facts = self._answer()

    def round(self, seed: int) -> dict[str, Any]:
        """One round of the contender."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"{self.name} ended with {code}; its output is in {self.log}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End of input is the worker's sign to leave."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def serve(name: str, folder: Path, prompt: int, gen: int) -> None:
    """Load, say so with the contender's facts, then a round for each line of stdin."""
    # Libraries print to stdout too: the answers get the real one, everything else goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = make(name, folder, prompt, gen)
    print(json.dumps(contender.facts), file=answers, flush=True)
    for line in sys.stdin:
        found = contender.round(int(line))
        found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

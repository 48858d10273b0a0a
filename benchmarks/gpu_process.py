"""The processes of the GPU benchmark, and what is kept of what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .gpu_lines import LOADING, Follower

PACKAGES = ("cli", "compiler", "models", "passes", "runtime")
LAST_WORDS = 12
LIVES = 6
# A worker looks at the clock between rows: so much later it has been too slow.
GRACE = 15.0


class Task:
    """Work of one process at a time. data: the rows, failed ({"name", "error"}) and notes it adds
    to, which other tasks may add to as well.

    arguments: of the worker, the section first. silence: seconds without a word after which the
    process is taken for hung. lives: processes it may have, each going on where the one before
    ended.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        data: dict[str, Any],
        silence: float,
        lives: int = LIVES,
    ) -> None:
        self.name, self.arguments, self.data, self.silence = name, arguments, data, silence
        self.ended = False
        self.worker: Worker | None = None
        self._begun: str | None = None
        self._done: set[str] = set()
        self._lives = lives
        self._heard = 0.0

    def start(self, place: Workplace, common: list[str]) -> None:
        """A process for what is not done yet."""
        self._lives -= 1
        self._heard = time.time()
        done = json.dumps(sorted(self._done))
        self.worker = place.start([*self.arguments, *common, "--done", done])

    def look(self, until: float) -> bool:
        """Take in what was said; whether that was anything. Afterwards `worker` is None if its
        process is gone, and `ended` is set if nothing is left to do."""
        assert self.worker is not None
        status = self.worker.ended()
        lines = self.worker.lines()
        now = time.time()
        if lines:
            self._heard = now
            self._take(lines)
        if status is None and now < until + GRACE and now < self._heard + self.silence:
            return bool(lines)
        why = "no time was left"
        if status is not None:
            why = f"the process ended with {_meaning(status)}"
        elif now < until + GRACE:
            why = f"the process was silent for {self.silence:.0f} s"
        self._close(why, now > until)
        return True

    def give_up(self, why: str) -> None:
        """Stop at once."""
        if self.worker is not None:
            self._close(why, True)
        elif not self.ended:
            self._fail(self.name, why)
            self.ended = True

    def _close(self, why: str, last: bool) -> None:
        assert self.worker is not None
        self.worker.stop()
        self._take(self.worker.lines())
        if not self.ended:
            if self._begun is None or self._begun not in self._done:
                words = self.worker.last_words()
                self._fail(self._begun or self.name, f"{why}; last words:\n{words}")
            self.ended = last or self._lives == 0 or self._begun is None
        self._begun, self.worker = None, None

    def _take(self, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            if "begin" in line:
                if self._begun is not None and not self._begun.startswith(LOADING):
                    self._done.add(self._begun)
                self._begun = line["begin"]
            elif "row" in line:
                self.data["rows"].append(line["row"])
            elif "failed" in line:
                self._fail(line["failed"], line["error"])
            elif "note" in line:
                self.data["notes"] |= line["note"]
            elif "end" in line:
                self.ended = True

    def _fail(self, name: str, error: str) -> None:
        self.data["failed"].append({"name": name, "error": error})
        self._done.add(name)


class Crew:
    """Tasks that run side by side, at most `limit` at once. heard: called when there is news."""

    def __init__(
        self,
        tasks: list[Task],
        place: Workplace,
        common: list[str],
        limit: int,
        heard: Callable[[], None],
    ) -> None:
        self._tasks, self._place, self._common = tasks, place, common
        self._limit, self._heard = limit, heard

    def step(self, until: float) -> bool:
        """Start what may start, look at what runs; whether there is more to come."""
        news = [task.look(until) for task in self._tasks if task.worker is not None]
        if any(news):
            self._heard()
        free = self._limit - sum(task.worker is not None for task in self._tasks)
        for task in self._tasks:
            if free > 0 and task.worker is None and not task.ended and time.time() < until:
                task.start(self._place, self._common)
                free -= 1
        return any(not task.ended for task in self._tasks)

    def finish(self, until: float, why: str) -> None:
        """Wait for all. What is not there at `until` is given up, for the reason `why`."""
        while self.step(until):
            if time.time() > until and not any(task.worker for task in self._tasks):
                self.give_up(why)
            time.sleep(0.05)

    def give_up(self, why: str) -> None:
        """Stop everything at once."""
        for task in self._tasks:
            task.give_up(why)
        self._heard()


def _meaning(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


class Worker:
    """A section's process. Follow `lines` until `ended`, or `stop` it."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], log: Path):
        self._log = log
        self._follower = Follower(log.with_suffix(".lines"))
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                # A group of its own, so that compilers it started end with it.
                start_new_session=True,
            )

    def lines(self) -> list[dict[str, Any]]:
        """What it said since the last call."""
        return self._follower.new()

    def ended(self) -> int | None:
        """Its exit status. Ask before the last `lines`, or some are missed."""
        return self._process.poll()

    def last_words(self) -> str:
        """The end of its output."""
        text = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(text[-LAST_WORDS:])

    def stop(self) -> None:
        """End it, if it has not ended, and what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Workplace:
    """Where workers run: a folder from which smelt and the benchmarks import, and scratch space."""

    def __init__(self, root: Path, scratch: Path, smoke: bool) -> None:
        self._scratch = scratch
        self._count = 0
        self._folder = root if importlib.util.find_spec("smelt.runtime") else _links(root, scratch)
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._environment["PYTHONWARNINGS"] = "ignore"
        # Of each process; by default every one takes all cores.
        self._environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        self._environment.pop("TRITON_INTERPRET", None)
        if smoke:
            self._environment["TRITON_INTERPRET"] = "1"

    def start(self, arguments: list[str]) -> Worker:
        """Start a worker; arguments: its section first."""
        self._count += 1
        log = self._scratch / f"{self._count:02d}-{arguments[0]}.log"
        base = self._scratch / "packages"
        command = [sys.executable, "-m", "benchmarks.gpu_worker", *arguments]
        command += ["--lines", str(log.with_suffix(".lines")), "--base", str(base)]
        return Worker(command, self._folder, self._environment, log)


def _links(root: Path, scratch: Path) -> Path:
    """A tree of links where the folders stand as they import, for a machine without smelt."""
    tree = scratch / "tree"
    (tree / "smelt").mkdir(parents=True)
    (tree / "benchmarks").symlink_to(root / "benchmarks")
    for path in (root / "smelt").iterdir():
        (tree / "smelt" / path.name).symlink_to(path)
    for name in PACKAGES:
        (tree / "smelt" / name).symlink_to(root / name)
    return tree

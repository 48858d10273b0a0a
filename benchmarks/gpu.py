"""Proves and measures smelt on a CUDA card: one command, one JSON file, no network.

    python -m benchmarks.gpu                     within 8 minutes; benchmarks/results/gpu.json
    python -m benchmarks.gpu --only models       nothing but whole models
    python -m benchmarks.gpu --smoke --out F     the same code on a CPU, with toy sizes
    python -m benchmarks.gpu --read F --docs docs/results.md

Sections, the most important first: checks (every kernel against its reference in float32);
attention and linears, timed beside the bound and beside what torch offers; whole models beside
transformers; the other kernels. Steps of the models are compiled while the checks run, and nothing
is timed before they are there. Each section is a process of its own: what crashes, hangs or breaks
the device costs one row, and the section goes on behind it. When the time is spent, what is left is
skipped, and the file says so; it is written again after every row.

Whole models have --layers of their layers, so that they are compiled in minutes; --layers 0 takes
all. Every row says how many there were.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu_process import LIVES, Crew, Task, Workplace
from .gpu_tables import failures, goals, tables

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "gpu.json"
KERNELS = ("attention", "linears", "activations", "experts", "sampling")
# In the order in which they run; "card" comes before all of them.
SECTIONS = ("checks", "attention", "linears", "models", "activations", "experts", "sampling")
# Of the whole time, when packages that are not compiled yet are given up.
COMPILING = 0.5
# Seconds without a word after which a process is taken for hung.
SILENCE = 120.0
SILENCE_COMPILING = 400.0
# Models in precisions, the most telling first, and those of a smoke run.
JOBS = tuple(f"{m} {p}" for m in ("llama-8b", "qwen3-4b") for p in ("bf16", "int4", "fp8"))
SMOKE_JOBS = (*JOBS[:3], JOBS[4])


class Run:
    """The record that is written, and what is left of the time."""

    def __init__(self, given: argparse.Namespace, place: Workplace) -> None:
        self.given, self.place = given, place
        self.began = time.time()
        self.until = self.began + 60 * given.minutes
        self.record: dict[str, Any] = {
            "command": " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "smoke": given.smoke,
            "minutes": given.minutes,
            "layers": given.layers,
            "card": {},
            "sections": {},
        }

    def write(self) -> None:
        """The file is whole at every moment."""
        self.record["seconds"] = round(time.time() - self.began, 1)
        out: Path = self.given.out
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        part.replace(out)

    def crew(self, section: str, tasks: list[Task], limit: int = 1) -> Crew:
        """For the tasks of a section of the record."""
        card = self.record["card"]
        common = [
            *(["--smoke"] if self.given.smoke else []),
            *("--bandwidth", str(card.get("copy_bytes_per_s", 0.0))),
            *("--layers", str(self.given.layers)),
            *("--most", str(self.given.most)),
            *("--until", str(self.until)),
        ]
        return Crew(tasks, self.place, common, limit, self.write)

    def data(self, section: str) -> dict[str, Any]:
        """Where the rows of a new section go."""
        made: dict[str, Any] = {"rows": [], "failed": [], "notes": {}}
        self.record["sections"][section] = made
        return made

    def perform(self, section: str, groups: Sequence[str] = ()) -> None:
        """Run a section, with a process for each of `groups` if there are any."""
        data = self.data(section)
        if time.time() > self.until:
            data["skipped"] = "the time was spent"
        else:
            began = time.time()
            silence = SILENCE_COMPILING if section == "models" else SILENCE
            asked = [[section, "--group", group] for group in groups] or [[section]]
            if section == "models":
                asked = [[section, *(a for job in self.given.job for a in ("--job", job))]]
            lives = 1 if section == "card" else LIVES
            tasks = [Task(" ".join(given[::2]), given, data, silence, lives) for given in asked]
            self.crew(section, tasks, len(tasks)).finish(self.until, "no time was left")
            data["seconds"] = round(time.time() - began, 1)
        self.write()
        say(f"{section}: {summary(data)}")


class Compiling:
    """Steps of models, and what transformers will run, compiled in the background."""

    def __init__(self, run: Run) -> None:
        given = run.given
        self._run, self._data, self._began = run, run.data("packages"), time.time()
        jobs = [["package", "--job", job] for job in given.job]
        models = dict.fromkeys(job.split()[0] for job in given.job)
        peers = [["peers", "--job", model] for model in models]
        tasks = [
            Task(" ".join(job[::2]), job, self._data, SILENCE_COMPILING, lives=1)
            for job in [*jobs[:3], *peers[:1], *jobs[3:], *peers[1:]]
        ]
        self._crew = run.crew("packages", tasks, given.processes)
        self._crew.step(run.until)

    def finish(self, until: float) -> None:
        """Wait until everything is compiled, and give up at `until` what is not."""
        self._crew.finish(until, "not compiled in time")
        self._data["seconds"] = round(time.time() - self._began, 1)
        self._run.write()
        say(f"packages: {summary(self._data)}")


def summary(data: dict[str, Any]) -> str:
    if "skipped" in data:
        return f"skipped, {data['skipped']}"
    return f"{len(data['rows'])} rows, {len(data['failed'])} failed, {data['seconds']} s"


def measure(run: Run, chosen: Sequence[str]) -> None:
    """All sections that are chosen, one after the other."""
    run.perform("card")
    run.record["card"] = run.record["sections"]["card"]["notes"]
    if not run.record["card"]:
        raise SystemExit(f"nothing can be measured: {run.record['sections']['card']['failed']}")
    compiling = Compiling(run) if "models" in chosen else None
    if "checks" in chosen:
        run.perform("checks", KERNELS)
    if compiling is not None:
        compiling.finish(run.began + 60 * run.given.minutes * COMPILING)
    for name in chosen:
        if name != "checks":
            run.perform(name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="may be given again")
    parser.add_argument("--job", action="append", choices=JOBS, help="of models; default: all")
    parser.add_argument("--layers", type=int, help="of whole models; 0: all; default: 8")
    parser.add_argument("--most", type=int, default=0, help="cases of each group; 0: all")
    parser.add_argument("--processes", type=int, default=8, help="that compile at once")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with toy sizes")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT.relative_to(ROOT)}")
    parser.add_argument("--docs", type=Path, help="a page whose table is replaced")
    parser.add_argument("--read", type=Path, help="take this result, and measure nothing")
    given = parser.parse_args()
    if given.layers is None:
        given.layers = 1 if given.smoke else 8
    given.job = given.job or list(SMOKE_JOBS if given.smoke else JOBS)
    if given.smoke and given.out == OUT:
        parser.error("--smoke is no result: give it an --out of its own")
    return given


def main() -> int:
    given = arguments()
    if given.read is None:
        scratch = Path(tempfile.mkdtemp(prefix="smelt-gpu-"))
        try:
            run = Run(given, Workplace(ROOT, scratch, given.smoke))
            measure(run, [name for name in SECTIONS if not given.only or name in given.only])
            record = run.record
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        say(f"results: {given.out}")
    else:
        record = json.loads(given.read.read_text(encoding="utf-8"))
    print(tables(record))
    if given.docs:
        from .quality import write_into

        write_into(given.docs, "gpu", tables(record))
    for line in (*goals(record), *failures(record)):
        say(line)
    return 1 if failures(record) else 0


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

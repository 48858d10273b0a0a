"""Job completion times under each policy: the real scheduler, simulated steps.

    python -m benchmarks.scheduling            a skewed trace, a table and a plot in text

Requests arrive as a Poisson process; most answers are short and a few very long (lognormal), as in
FastServe's evaluation (Wu et al. 2023, arXiv:2305.05920), or as in a CSV trace of Azure's
(--trace: TIMESTAMP, ContextTokens, GeneratedTokens). A step costs `--step-ms` plus `--token-us` for
each token it computes. The clock is the simulation's: the result is the same on every machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from smelt.runtime.blocks import PagedMemory
from smelt.runtime.policies import POLICIES
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.scheduler import Scheduler
from smelt.runtime.sequence import Sequence

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = 16


@dataclass(frozen=True)
class Job:
    """arrival in seconds; prompt and answer in tokens."""

    arrival: float
    prompt: int
    answer: int


def skewed(count: int, rate: float, seed: int) -> list[Job]:
    """Lognormal answers (median 40, a heavy tail to 2,000), prompts of 16 to 600 tokens."""
    rng = random.Random(seed)
    now, jobs = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        answer = min(2000, max(1, round(rng.lognormvariate(math.log(40), 1.3))))
        jobs.append(Job(now, rng.randint(16, 600), answer))
    return jobs


def traced(path: Path, count: int) -> list[Job]:
    """The first requests of a trace file, times from its first line."""
    jobs: list[Job] = []
    first: datetime | None = None
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            when = datetime.fromisoformat(row["TIMESTAMP"][:26])
            first = first or when
            prompt, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            jobs.append(Job((when - first).total_seconds(), min(prompt, 4000), max(1, answer)))
            if len(jobs) == count:
                break
    return jobs


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(
    jobs: list[Job], policy: str, lanes: int, budget: int, blocks: int, step: float, token: float
) -> list[float]:
    """Completion time of each job in seconds, from its arrival."""
    clock = Clock()
    memory = PagedMemory(blocks, BLOCK, [0])
    scheduler = Scheduler(memory, budget, lanes, policy=policy, clock=clock)
    waiting = sorted(jobs, key=lambda job: job.arrival, reverse=True)
    done: dict[int, float] = {}
    number = 0
    while waiting or scheduler.has_work:
        if not scheduler.has_work:
            clock.now = max(clock.now, waiting[-1].arrival)
        while waiting and waiting[-1].arrival <= clock.now:
            job = waiting.pop()
            tokens = [number * 7919 + i for i in range(job.prompt)]  # nothing in common
            sequence = Sequence(number, tokens, SamplingParams(), job.prompt + job.answer)
            sequence.arrival = job.arrival
            scheduler.add(sequence)
            number += 1
        chunks = scheduler.plan()
        scheduler.copies.clear()
        clock.now += step + token * sum(chunk.count for chunk in chunks)
        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.rows:
                sequence = chunk.sequence
                sequence.tokens.append(-1)
                if len(sequence.tokens) >= sequence.limit:
                    done[sequence.id] = clock.now - sequence.arrival
                    scheduler.finish(sequence)
    return [done[i] for i in range(number)]


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {
        f"p{p}": ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] for p in (50, 95, 99)
    }
    return {"mean": sum(times) / len(times), **at, "max": ordered[-1]}


def plot(results: dict[str, list[float]], width: int = 60) -> str:
    """The share of jobs that are done after so many seconds, a row of characters a policy."""
    longest = max(max(times) for times in results.values())
    edges = [longest ** ((i + 1) / width) * 0.1 ** (1 - (i + 1) / width) for i in range(width)]
    lines = [f"share of jobs done, from 0.1 s to {longest:.0f} s (logarithmic): 0 ' ' to 1 '@'"]
    shades = " .:-=+*#%@"
    for name, times in results.items():
        shares = [sum(t <= edge for t in times) / len(times) for edge in edges]
        lines.append(f"{name:>9} |{''.join(shades[int(share * 9)] for share in shares)}|")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, help="a CSV of Azure's instead")
    parser.add_argument("--jobs", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=5.0, help="arrivals a second")
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--step-ms", type=float, default=15.0)
    parser.add_argument("--token-us", type=float, default=150.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    jobs = (
        traced(given.trace, given.jobs)
        if given.trace
        else skewed(given.jobs, given.rate, given.seed)
    )
    results = {
        name: simulate(
            jobs,
            name,
            given.lanes,
            given.budget,
            given.blocks,
            given.step_ms / 1e3,
            given.token_us / 1e6,
        )
        for name in POLICIES
    }
    print("| policy | mean s | p50 | p95 | p99 | max |\n|---|---|---|---|---|---|")
    for name, times in results.items():
        found = summary(times)
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in found.values()) + " |")
    print(plot(results))
    data = {
        "date": time.strftime("%Y-%m-%d"),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()},
        "completion_s": {name: summary(times) for name, times in results.items()},
    }
    out = given.out or RESULTS / "scheduling.json"
    out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

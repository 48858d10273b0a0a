"""The kernel sections of the GPU benchmark: correctness of every case, and times beside the bound.

Runs in a process of its own. After a case that fails, the device is asked whether it still works:
an illegal access leaves it broken for the process, which then ends, and the benchmark starts
another for the cases that are left.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from smelt.runtime.kernels.gpu.roofline import bound_seconds

from .gpu_attention_cases import attention_cases
from .gpu_cases import Case, Maker, Scale, Trial
from .gpu_linear_cases import linear_cases
from .gpu_lines import Lines
from .gpu_measure import Call, card_of, copies_of, error_of, first_line, synchronize, timed
from .gpu_other_cases import activation_cases, expert_cases, sampling_cases

GROUPS: dict[str, Callable[[Scale], Iterator[Case]]] = {
    "attention": attention_cases,
    "linears": linear_cases,
    "activations": activation_cases,
    "experts": expert_cases,
    "sampling": sampling_cases,
}
# Peers that Inductor compiles: once while the checks run, for its cache on disk.
COMPILED = ("flex_attention", "inductor")
BROKEN = 3  # exit status: the device does not answer any more


@dataclass(frozen=True)
class Settings:
    """How a section runs. bandwidth: measured bytes a second; until: of time.time(), when it ends.

    most: cases of each group, 0 for all of them.
    """

    device: torch.device
    scale: Scale
    until: float
    bandwidth: float = 0.0
    most: int = 0

    def cases(self, group: str) -> list[Case]:
        found = list(GROUPS[group](self.scale))
        return found[: self.most] if self.most else found


def check(group: str, settings: Settings, lines: Lines, done: Collection[str]) -> None:
    """Every case of a group against its reference: a row each with the error and its limit."""
    _each(group, settings, lines, done, _check)


def measure(group: str, settings: Settings, lines: Lines, done: Collection[str]) -> None:
    """The timed cases of a group: a row each."""
    _each(group, settings, lines, done, _measure)


def _each(
    group: str,
    settings: Settings,
    lines: Lines,
    done: Collection[str],
    work: Callable[[Case, Settings], dict[str, Any] | None],
) -> None:
    try:
        cases = settings.cases(group)
    except Exception as error:  # a kernel module that does not import
        lines.failed(group, first_line(error))
        return
    for case in cases:
        if case.name in done:
            continue
        if time.time() > settings.until:
            lines.failed(case.name, "no time was left")
            continue
        lines.begin(case.name)
        began = time.perf_counter()
        try:
            found = work(case, settings)
            synchronize(settings.device)
        except Exception as error:  # whatever a kernel or its compiler raises
            lines.failed(case.name, first_line(error))
            gc.collect()
            still_works(settings.device)
            continue
        if found is not None:
            row = {"kernel": case.kernel, "shape": case.shape, "group": group, **found}
            lines.row({**row, "seconds": round(time.perf_counter() - began, 2)})


def still_works(device: torch.device) -> None:
    """Ends the process where the device is broken."""
    try:
        synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError:
        raise SystemExit(BROKEN) from None


def _check(case: Case, settings: Settings) -> dict[str, Any]:
    trial = case.make(Maker(settings.device))
    with torch.no_grad():
        error = error_of(trial.run(), trial.reference(), trial.exact)
    for name in COMPILED if case.timed else ():
        if name in trial.peers:
            _peer(name, [trial], settings.device, measured=False)
    kind = "share of elements that differ" if trial.exact else "relative"
    ok = error <= trial.tolerance
    return {"error": error, "limit": trial.tolerance, "error_is": kind, "ok": ok}


def _measure(case: Case, settings: Settings) -> dict[str, Any] | None:
    if not case.timed:
        return None
    device = settings.device
    first = case.make(Maker(device))
    cost = first.cost()
    count = copies_of(cost.bytes, device)
    trials = [first, *(case.make(Maker(device, seed)) for seed in range(1, count))]
    with torch.no_grad():
        row: dict[str, Any] = timed([trial.run for trial in trials], device, first.capture)
        peers = {name: _peer(name, trials, device) for name in first.peers}
    card, _ = card_of(device)
    bound = 1e3 * bound_seconds(cost, card, settings.bandwidth or None)
    row |= {
        "bytes": cost.bytes,
        "operations": cost.operations,
        "copies": count,
        "bound_ms": bound,
        "fraction_of_bound": bound / row["ms"],
        "peers": peers,
    }
    if case.goal is not None:
        row["goal"] = _goal(case, row)
    return row


def _peer(
    name: str, trials: list[Trial], device: torch.device, measured: bool = True
) -> dict[str, Any]:
    try:
        calls: list[Call] = [trial.peers[name]() for trial in trials]
        if not measured:
            return {"ran": calls[0]() is not None}
        return timed(calls, device, trials[0].capture)
    except ImportError as error:
        return {"error": f"not installed: {error}"}
    except Exception as error:  # a peer that does not take this shape or this card
        synchronize(device)
        return {"error": first_line(error)}


def _goal(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """{"of", "least", "found", "met"}; met is None where the peer gave no time."""
    goal = case.goal
    assert goal is not None
    found = row["fraction_of_bound"]
    if goal.of != "bound":
        peer = row["peers"].get(goal.of, {}).get("ms")
        found = peer / row["ms"] if peer else None
    met = None if found is None else found >= goal.least
    return {"of": goal.of, "least": goal.least, "found": found, "met": met}

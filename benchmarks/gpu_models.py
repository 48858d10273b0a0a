"""Whole models on the GPU: decoding and prefill beside the bound and transformers.

smelt runs as it serves: the engine, its scheduler, paged cache and sampler, CUDA graphs, the next
step launched ahead. transformers is the same class with as many layers, in the same process, and
the two take turns. The bound of a decode step is the weights it reads, once, and the keys and
values of its sequences, at the bandwidth of a large copy measured on this card; a prefill's is its
products at the data sheet's rate.

Host gap: what lies between the last kernel of a step's program and the first of the next one's, by
CUDA events, as a share of both together. Choosing the token lies in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from smelt.runtime.kernels.gpu.roofline import Cost, bound_seconds
from smelt.runtime.manifest import FILE_NAME

from .gpu_cases import Model, Scale
from .gpu_kernels import Settings, still_works
from .gpu_lines import LOADING, Lines
from .gpu_measure import card_of, direct_ms, first_line
from .gpu_packages import Job, depth
from .gpu_peers import Transformers, graph_refusals
from .gpu_profile import profile
from .gpu_smelt import Smelt

GAP_MOST = 0.05
INT4_OVER_BF16 = 2.4
LEAST_OF_BOUND = {"bf16": 0.85, "int4": 0.65}


@dataclass(frozen=True)
class Sizes:
    """What is run: `rounds` of `count` decode steps at each batch, and a prompt of `prefill`."""

    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 512
    count: int = 16
    rounds: int = 3
    prefill: int = 2048

    @property
    def steps(self) -> int:
        """Of a batch: a round to warm up, those that count, and one to profile."""
        return self.count * (self.rounds + 2)

    @property
    def tokens(self) -> int:
        """That a cache must hold: the first sequences decode while the last read their prompts."""
        each = -(-(self.prompt + 2 * self.steps) // 16) * 16
        return max(max(self.batches) * each, 2 * self.prefill)


def sizes_of(scale: Scale) -> Sizes:
    return Sizes((1, 2), 5, 2, 1, 20) if scale.small else Sizes()


def run(
    settings: Settings, jobs: Sequence[Job], base: Path, lines: Lines, done: Collection[str] = ()
) -> None:
    """Rows of every model, batch and contender; done: names of what is not wanted any more."""
    for model in dict.fromkeys(job.model for job in jobs):
        comparison = _Comparison(settings, model, jobs[0].layers, lines, done)
        comparison.run([job for job in jobs if job.model == model], base)
        del comparison
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def warm_peer(scale: Scale, name: str, layers: int, device: torch.device, lines: Lines) -> None:
    """Compile what transformers will run: Inductor keeps it on disk, for the process that times."""
    (model,) = (one for one in (scale.llama, scale.qwen3) if one.name == name)
    sizes = sizes_of(scale)
    lines.begin(name)
    peer = Transformers(model, layers, device)
    seconds: dict[str, float] = {}

    def took(what: str, work: Callable[[], Any]) -> None:
        began = time.perf_counter()
        work()
        seconds[what] = round(time.perf_counter() - began, 1)

    for batch in sizes.batches:
        peer.start(batch, sizes.prompt, sizes.steps)
        took(f"batch {batch}", lambda: peer.steps(3))
        if batch == 1:
            took("prefill", lambda: peer.prefill(sizes.prefill))
    lines.row(
        {"model": name, "precision": "bf16", "layers": depth(model, layers), "seconds": seconds}
    )


class _Comparison:
    """The contenders of one model."""

    def __init__(
        self,
        settings: Settings,
        model: Model,
        layers: int,
        lines: Lines,
        done: Collection[str],
    ) -> None:
        self.settings, self.model, self.lines, self.done = settings, model, lines, done
        self.device, self.sizes = settings.device, sizes_of(settings.scale)
        self.layers = depth(model, layers)
        self.card, _ = card_of(self.device)

    def run(self, jobs: list[Job], base: Path) -> None:
        contenders: list[Any] = []
        for job in jobs:
            if not (job.folder(base) / FILE_NAME).is_file():
                if job.name not in self.done:
                    self.lines.failed(job.name, "its steps were not compiled in time, or failed to")
                continue
            self._load(job.precision, partial(self._open, job, base, contenders))
        self._load(
            "transformers",
            lambda: contenders.append(Transformers(self.model, self.layers, self.device)),
        )
        for batch in self.sizes.batches:
            self._each(contenders, f"decode at batch {batch}", self._decode, batch)
            if batch == 1:
                self._each(contenders, "prefill", self._prefill)
        self.lines.note({f"{self.model.name}: graphs transformers did without": graph_refusals()})

    def _open(self, job: Job, base: Path, contenders: list[Any]) -> None:
        contenders.append(Smelt(job, base, self.device, self.sizes.tokens))

    def _load(self, what: str, work: Callable[[], Any]) -> bool:
        """Work that prepares; whether it went well. One that failed before is not tried again."""
        name = f"{LOADING}{self.model.name} {what}"
        if name in self.done:
            return False
        self.lines.begin(name)
        try:
            work()
            return True
        except Exception as error:
            self.lines.failed(name, first_line(error))
            gc.collect()
            still_works(self.device)
            return False

    def _each(self, contenders: list[Any], what: str, work: Any, *given: Any) -> None:
        name = f"{self.model.name} {what}"
        if name in self.done:
            return
        if time.time() > self.settings.until:
            self.lines.failed(name, "no time was left")
            return
        for row in work(contenders, what, *given):
            self.lines.row({"model": self.model.name, "layers": self.layers, **row})

    def _ready(self, contenders: list[Any], what: str, warm: Callable[[Any], Any]) -> list[Any]:
        """The contenders that got through `warm`. What follows counts."""
        found = [one for one in contenders if self._load(f"{one.name} {what}", partial(warm, one))]
        self.lines.begin(f"{self.model.name} {what}")
        return found

    def _decode(self, contenders: list[Any], what: str, batch: int) -> list[dict[str, Any]]:
        def warm(one: Any) -> None:
            one.start(batch, self.sizes.prompt, self.sizes.steps)
            one.steps(self.sizes.count)
            if isinstance(one, Smelt):
                one.watched.spans()

        ready = self._ready(contenders, what, warm)
        seconds: dict[str, list[float]] = {one.name: [] for one in ready}
        spans: dict[str, list[tuple[list[float], list[float]]]] = {one.name: [] for one in ready}
        for turn in range(self.sizes.rounds):
            at = turn % len(ready) if ready else 0
            for one in ready[at:] + ready[:at]:
                seconds[one.name].append(one.steps(self.sizes.count))
                if isinstance(one, Smelt):
                    spans[one.name].append(one.watched.spans())
        rows = []
        for one in ready:
            step_ms = 1e3 * median(seconds[one.name]) / self.sizes.count
            row = {"what": "decode", "batch": batch, "contender": one.name, "step_ms": step_ms}
            row["tokens_per_s"] = 1e3 * batch / step_ms
            if isinstance(one, Smelt):
                row |= self._beside_bound(one, batch, step_ms, spans[one.name])
                if batch == 1:
                    row["profile"] = profile(partial(one.steps, self.sizes.count), self.sizes.count)
            rows.append(row)
        for one in ready:
            one.stop()
        return _compared(rows)

    def _beside_bound(
        self,
        one: Smelt,
        batch: int,
        step_ms: float,
        spans: list[tuple[list[float], list[float]]],
    ) -> dict[str, Any]:
        memory = one.manifest.memory
        context = self.sizes.prompt + self.sizes.steps // 2
        moved = memory["weight_bytes_per_token"] + batch * context * memory["kv_bytes_per_token"]
        bound = 1e3 * bound_seconds(Cost(moved), self.card, self.settings.bandwidth or None)
        inside = sum(sum(steps) for steps, _ in spans)
        between = sum(sum(gaps) for _, gaps in spans)
        gaps = sum(len(gaps) for _, gaps in spans)
        gap_ms = between / max(1, gaps)
        row: dict[str, Any] = {
            "bytes": moved,
            "bound_ms": bound,
            "fraction_of_bound": bound / step_ms,
            "host_gap_ms": gap_ms,
            "host_gap_share": between / max(1e-9, inside + between),
        }
        if self.layers < self.model.layers:
            row["all_layers"] = self._all_layers(one, batch, step_ms, gap_ms, context)
        return row

    def _all_layers(
        self, one: Smelt, batch: int, step_ms: float, gap_ms: float, context: int
    ) -> dict[str, float]:
        """What a step of all layers would take, a layer's share being what is neither output layer
        nor gap."""
        hidden = torch.randn(batch, self.model.hidden, device=self.device, dtype=torch.bfloat16)
        head = hidden.new_empty(self.model.vocab, self.model.hidden).normal_(std=0.02)
        head_ms = direct_ms(lambda: F.linear(hidden, head), self.device)
        rest = head_ms + gap_ms
        factor = self.model.layers / self.layers
        memory = one.manifest.memory
        layer_bytes = memory["weight_bytes_per_token"] - head.nbytes
        layer_bytes += batch * context * memory["kv_bytes_per_token"]
        moved = Cost(int(head.nbytes + factor * layer_bytes))
        bound = 1e3 * bound_seconds(moved, self.card, self.settings.bandwidth or None)
        projected = rest + factor * (step_ms - rest)
        return {
            "head_ms": head_ms,
            "projected_step_ms": projected,
            "bound_ms": bound,
            "fraction_of_bound": bound / projected,
            "host_gap_share": gap_ms / projected,
        }

    def _prefill(self, contenders: list[Any], what: str) -> list[dict[str, Any]]:
        ready = self._ready(contenders, what, lambda one: one.prefill(self.sizes.prefill))
        seconds: dict[str, list[float]] = {one.name: [] for one in ready}
        for _ in range(self.sizes.rounds):
            for one in ready:
                seconds[one.name].append(one.prefill(self.sizes.prefill))
        for one in ready:
            one.stop()
        operations = 2 * self.sizes.prefill * self._matrix_elements()
        rows = []
        for one in ready:
            took = median(seconds[one.name])
            kind = "fp8" if one.name == "fp8" else "bf16"
            bound = bound_seconds(Cost(0, operations, kind), self.card)
            rows.append(
                {
                    "what": "prefill",
                    "batch": 1,
                    "contender": one.name,
                    "step_ms": 1e3 * took,
                    "tokens_per_s": self.sizes.prefill / took,
                    "bound_ms": 1e3 * bound,
                    "fraction_of_bound": bound / took,
                }
            )
        return _compared(rows)

    def _matrix_elements(self) -> int:
        """Weights of the layers' products; the last token's logits are left out."""
        model = self.model
        attention = model.hidden * (model.qkv + model.heads * model.head)
        return self.layers * (attention + 3 * model.hidden * model.ffn)


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With ratios to transformers and to bf16, and the goals."""
    by_name = {row["contender"]: row for row in rows}
    for row in rows:
        for other in ("transformers", "bf16"):
            if other in by_name:
                row[f"times_{other}"] = by_name[other]["step_ms"] / row["step_ms"]
        row["goals"] = _goals(row, by_name.get("bf16"))
    return rows


def _goals(row: dict[str, Any], bf16: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Goals of a decode row: with all layers where that had to be projected."""
    if row["what"] != "decode" or row["contender"] == "transformers":
        return {}
    whole = row.get("all_layers", row)
    goals: dict[str, dict[str, Any]] = {}

    def goal(name: str, found: float, wanted: float, met: bool) -> None:
        projected = "all_layers" in row
        goals[name] = {"found": found, "wanted": wanted, "met": met, "projected": projected}

    share = whole["host_gap_share"]
    goal("host gap", share, GAP_MOST, share < GAP_MOST)
    least = LEAST_OF_BOUND.get(row["contender"])
    if row["batch"] == 1 and least is not None:
        found = whole["fraction_of_bound"]
        goal("fraction of bound", found, least, found >= least)
    if row["batch"] == 1 and row["contender"] == "int4" and bf16 is not None:
        times = _step_ms(bf16) / _step_ms(row)
        goal("times bf16", times, INT4_OVER_BF16, times >= INT4_OVER_BF16)
    return goals


def _step_ms(row: dict[str, Any]) -> float:
    found: float = row.get("all_layers", {}).get("projected_step_ms", row["step_ms"])
    return found

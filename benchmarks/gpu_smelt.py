"""smelt as a contender of the GPU benchmark: the engine over a step with random weights."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import smelt.runtime.ops  # noqa: F401 - registers the operators that packages call
from smelt.runtime.artifact import Program
from smelt.runtime.batch import Batch
from smelt.runtime.cuda_graphs import with_graphs
from smelt.runtime.engine import Engine
from smelt.runtime.errors import SmeltError
from smelt.runtime.manifest import Manifest, read
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.specialised import open_steps

from .gpu_measure import synchronize
from .gpu_packages import MAX_TOKENS, Job, random_weights


class Watched:
    """A step program whose steps lie between two marks on the device."""

    def __init__(self, program: Any) -> None:
        self.spec, self.layout = program.spec, program.layout
        self.vocab_size, self.device = program.vocab_size, program.device
        self.features = program.features
        self._program = program
        self.marks: list[Any] = []

    def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        self._mark()
        logits: torch.Tensor = self._program.run(batch, caches)
        self._mark()
        return logits

    def run_with_features(
        self, batch: Batch, caches: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise SmeltError("the benchmark's steps give no features")

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> tuple[list[float], list[float]]:
        """Milliseconds (inside steps, between them) since the last call."""
        marks, self.marks = self.marks, []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            times = [a.elapsed_time(b) for a, b in pairwise(marks)]
        else:
            times = [1e3 * (b - a) for a, b in pairwise(marks)]
        return times[::2], times[1::2]


class Smelt:
    """One precision of a model behind the engine, with random weights."""

    def __init__(self, job: Job, base: Path, device: torch.device, tokens: int) -> None:
        folder = job.folder(base)
        self.name = job.precision
        self.manifest: Manifest = read(folder)
        if self.manifest.backend != "aoti":
            from smelt.runtime.kernels.gpu import operators  # noqa: F401 - what the graph calls
        weights = random_weights(folder, device)
        constants = {name: weights[planned] for name, planned in self.manifest.constants.items()}
        program = Program(self.manifest, open_steps(folder, self.manifest, constants), weights)
        self.watched = Watched(with_graphs(program))
        self.engine = Engine(
            self.watched,
            kv_cache_tokens=tokens,
            cuda_graphs=False,  # they are in `watched`
            prefix_cache=False,
            max_tokens=MAX_TOKENS,
        )
        self._ids: list[int] = []

    def start(self, batch: int, prompt: int, steps: int) -> None:
        """Read prompts of random tokens; afterwards `steps` decode steps may follow."""
        self._answer(batch, prompt, steps)
        self.watched.spans()

    def _answer(self, batch: int, prompt: int, steps: int) -> None:
        """Until every sequence has a token. The first to have one go on meanwhile."""
        vocab = self.watched.vocab_size
        params = SamplingParams(temperature=0.0, max_tokens=steps + batch + 8, ignore_eos=True)
        waiting = set()
        for _ in range(batch):
            ids = torch.randint(0, vocab, (prompt,)).tolist()
            waiting.add(self.engine.add_request(ids, params))
        self._ids = sorted(waiting)
        while waiting:
            waiting -= {output.id for output in self._outputs() if output.token_ids}

    def _outputs(self) -> list[Any]:
        outputs = self.engine.step()
        for output in outputs:
            if output.error is not None:
                raise SmeltError(f"a step failed: {output.error}") from output.error
        return outputs

    def steps(self, count: int) -> float:
        """Seconds of so many decode steps.

        The engine may have launched a step ahead; waiting on both sides counts as many as asked.
        """
        synchronize(self.watched.device)
        began = time.perf_counter()
        for _ in range(count):
            self._outputs()
        synchronize(self.watched.device)
        return time.perf_counter() - began

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt to its first token."""
        synchronize(self.watched.device)
        began = time.perf_counter()
        self._answer(1, tokens, 1)
        seconds = time.perf_counter() - began
        self.stop()
        return seconds

    def stop(self) -> None:
        """End all requests."""
        for number in self._ids:
            self.engine.abort(number)
        while self.engine.has_work:
            self.engine.step()
        self.watched.spans()

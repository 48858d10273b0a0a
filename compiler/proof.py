"""The proof an artifact carries: its compiled step against the traced model, and its speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from smelt.passes.program import Program
from smelt.passes.weights import TensorSource
from smelt.runtime.artifact import open_artifact
from smelt.runtime.batch import Batch
from smelt.runtime.errors import SmeltError
from smelt.runtime.machine import memory
from smelt.runtime.measure import bench
from smelt.runtime.tokenizer import Tokenizer

from .calibration_data import BUILTIN
from .numerics import compare, spec_values, step_values

TOKENS = 256
# An unquantized step that moves the distribution this far is wrong, not rounded differently.
WRONG_KL = 0.1


class Proof:
    """Logits of the traced program on a fixed text, taken before any pass ran.

    The whole model is in memory for that one run; where it would take more than half of what is
    free, nothing is measured and the manifest says so.
    """

    def __init__(
        self, program: Program, source: TensorSource, folder: Path | None, text: str
    ) -> None:
        self._ids = _tokens(program, folder, text)
        self._reference: torch.Tensor | None = None
        names = program.used_weights()
        if 2 * sum(program.weights.specs[n].nbytes for n in names) > memory()[1]:
            return
        weights = dict(program.weights.materialize(names, source))
        output = program.run(step_values(program, self._ids), weights)
        self._reference = (output[0] if isinstance(output, list | tuple) else output).float()

    def quality(self, artifact: Path, quantized: bool) -> dict[str, Any]:
        """{tokens, max_abs, kl, top1} of the compiled step against the traced model.

        Raises SmeltError when an unquantized step is far from it, so that a miscompiled model is
        never handed out.
        """
        if self._reference is None:
            return {"not_measured": "the original takes more than half of the free memory"}
        step = open_artifact(artifact).program
        values = spec_values(step.spec, self._ids)
        batch = Batch.named(values, step.spec)
        caches = [values[f"kv_cache_{i}"].to(step.device) for i in range(step.spec.layers)]
        logits = step.run(batch, caches).float().cpu()
        measured = compare(logits, self._reference)
        wrong = not torch.isfinite(logits).all() or not measured["kl"] < float("inf")
        if wrong or (not quantized and measured["kl"] > WRONG_KL):
            raise SmeltError(
                f"the compiled step does not reproduce the model (KL {measured['kl']:.3g}); "
                "compile with --check-numerics to find the pass, or with --backend eager"
            )
        return {"tokens": len(self._ids), **measured}


def speed(artifact: Path) -> dict[str, Any]:
    """A short measurement beside the memory bandwidth, as `smelt bench` does it at length."""
    if not (artifact / "tokenizer.json").is_file():
        return {"not_measured": "there is no tokenizer, so no engine to measure"}
    found = bench(artifact, prompt=32, gen=32, rounds=1)
    return {name: value for name, value in vars(found).items() if name != "peak_rss_bytes"}


def _tokens(program: Program, folder: Path | None, text: str) -> torch.Tensor:
    """int64 [T]: the end of the calibration text where there is a tokenizer, random ids otherwise.

    text: the source of calibration text, as `load_calibration` takes it; anything but a .txt file
    gives the text that ships.
    """
    count = min(TOKENS, program.facts.max_position - 64)
    if folder is not None and (folder / "tokenizer.json").is_file():
        own = Path(text) if text.endswith(".txt") else folder / "calibration.txt"
        path = own if own.is_file() else BUILTIN
        ids = Tokenizer(folder).encode(path.read_text(encoding="utf-8")[-8 * count :])[:count]
        if len(ids) > count // 2:
            return torch.tensor(ids)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, program.facts.vocab_size, (max(count, 1),), generator=generator)

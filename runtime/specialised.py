"""One step compiled several times, each time for steps of at most so many tokens.

A compiled step cannot look at its own size: which kernel suits few rows and which suits many has
to be decided when it is compiled. So the compiler lowers the same graph for several bounds, and the
step of the moment runs in the first package whose bounds hold it. All packages use the same weights
in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .manifest import Manifest


class Step(Protocol):
    """A package or an exported graph: tensors of the contract in, logits (and features) out."""

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor: ...

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Bounds:
    """What a package was compiled for: tokens of a step, and of one sequence in it; 0 for any."""

    max_tokens: int = 0
    max_query: int = 0

    def hold(self, tokens: int, max_query: int) -> bool:
        """max_query 0: it is not known how many tokens one sequence brings."""
        if self.max_tokens and tokens > self.max_tokens:
            return False
        return not self.max_query or 0 < max_query <= self.max_query


class Specialised:
    """The packages of a step, of which the last takes any step."""

    def __init__(self, steps: Sequence[tuple[Bounds, Step]]) -> None:
        self._steps = list(steps)

    def choose(self, tokens: int, max_query: int) -> Step:
        """The first one whose bounds hold a step of so many tokens."""
        return next(step for bounds, step in self._steps if bounds.hold(tokens, max_query))


def open_steps(
    folder: Path, loaded: Manifest, constants: Mapping[str, torch.Tensor]
) -> Specialised:
    """Every package of an artifact over the same `constants`; one that takes all if it has one."""
    entries = loaded.steps or [{"file": "graphs/step.pt2", "max_tokens": 0, "max_query": 0}]
    return Specialised(
        [
            (
                Bounds(entry["max_tokens"], entry["max_query"]),
                _open(folder / entry["file"], loaded, constants),
            )
            for entry in entries
        ]
    )


def _open(path: Path, loaded: Manifest, constants: Mapping[str, torch.Tensor]) -> Step:
    if loaded.backend == "aoti":
        from .package import Package

        return Package(path, constants, single_threaded=loaded.target["device"] == "cuda")
    from .exported import ExportedStep

    return ExportedStep(path, constants, loaded.backend)

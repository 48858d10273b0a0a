"""Run a step from its exported graph: in eager mode, or through torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from .archive import check


class ExportedStep:
    """A step whose weights are graph inputs, named in order by `constants`.

    backend: "eager" interprets the graph, for debugging; "compile" goes through torch.compile with
    dynamic shapes, for research, and compiles in the process that runs it.
    """

    def __init__(self, path: Path, constants: Mapping[str, torch.Tensor], backend: str) -> None:
        check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.load(path)
        names = exported.graph_signature.user_inputs
        self._weights = [constants[n] for n in names if n in constants]
        module = exported.module(check_guards=False)
        self._run = torch.compile(module, dynamic=True) if backend == "compile" else module

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """One step's logits."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """All that one step gives, as `Package.outputs`; weights are passed first."""
        with torch.no_grad():
            output = self._run(*self._weights, *inputs)
        return list(output) if isinstance(output, list | tuple) else [output]

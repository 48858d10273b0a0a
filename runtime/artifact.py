"""Open an artifact: check it, map its weights, bind its compiled step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import isa, manifest
from .batch import Batch, BatchLayout, CacheSpec
from .errors import TargetMismatch
from .integrity import verify
from .manifest import Manifest
from .specialised import Specialised, open_steps
from .transfer import upload


class Program:
    """The step program an engine drives.

    run(batch, caches) -> logits [R, V]; caches are mutated, the batch's tensors may lie on the host
    or on the device. spec, layout, vocab_size and device say what it takes; features what it gives
    beside logits, None for nothing. weights: by name.
    """

    def __init__(
        self,
        loaded: Manifest,
        steps: Specialised,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.spec: CacheSpec = loaded.cache
        self.layout: BatchLayout = loaded.layout
        self.vocab_size: int = loaded.model["vocab_size"]
        self.device = torch.device(loaded.target["device"])
        self.features = loaded.features
        self.weights: Mapping[str, torch.Tensor] = weights or {}
        self._steps = steps

    def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        step = self._steps.choose(len(batch.input_ids), batch.max_query)
        return step.run([*self._inputs(batch), *caches])

    def run_with_features(
        self, batch: Batch, caches: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and features as `Features` says; only where `features` is not None."""
        step = self._steps.choose(len(batch.input_ids), batch.max_query)
        logits, features = step.outputs([*self._inputs(batch), *caches])
        return logits, features

    def _inputs(self, batch: Batch) -> list[torch.Tensor]:
        tensors = batch.tensors()
        return tensors if self.device.type == "cpu" else upload(tensors, self.device)


@dataclass
class LoadedArtifact:
    """An opened artifact. weights are the mapped tensors by name."""

    folder: Path
    manifest: Manifest
    program: Program
    weights: Mapping[str, torch.Tensor]


def open_artifact(folder: Path | str) -> LoadedArtifact:
    """Open the artifact in `folder` without tracing, compiling or copying weights.

    Raises ManifestError, IntegrityError or TargetMismatch, each naming what differs.
    """
    folder = Path(folder)
    loaded = manifest.read(folder)
    verify(folder, loaded.files)
    check_target(loaded)
    from . import ops  # noqa: F401 - registers the operators the package calls

    if loaded.target["device"] == "cpu" and any(p["provider"] == "cpu" for p in loaded.providers):
        from .kernels import build

        library = folder / "kernels" / "smelt_cpu.so"
        build.load(library if library.is_file() else None)
    if loaded.backend != "aoti" and any(p["provider"] == "triton" for p in loaded.providers):
        # A package has the kernels compiled in; a graph calls the operators that launch them.
        from .kernels.gpu import operators  # noqa: F401
    weights = map_weights(folder, loaded.target["device"])
    constants = {name: weights[tensor] for name, tensor in loaded.constants.items()}
    program = Program(loaded, open_steps(folder, loaded, constants), weights)
    return LoadedArtifact(folder, loaded, program, weights)


def check_target(loaded: Manifest) -> None:
    """Raise TargetMismatch when this process cannot run the compiled part."""
    target = loaded.target
    torch_version = torch.__version__.split("+")[0]
    if target["torch"] != torch_version:
        raise TargetMismatch(f"built for torch {target['torch']}, found {torch_version}")
    if target["device"] == "cuda":
        _check_cuda(target)
    if target["machine"] != isa.machine():
        raise TargetMismatch(f"built for {target['machine']}, found {isa.machine()}")
    lacking = isa.missing(target["isa"])
    if lacking:
        raise TargetMismatch(
            f"built for a processor with {', '.join(lacking)}, which this one lacks"
        )


def _check_cuda(target: Mapping[str, Any]) -> None:
    if not torch.cuda.is_available():
        raise TargetMismatch("built for cuda, and this machine has no CUDA device")
    found = list(torch.cuda.get_device_capability())
    if found != target["capability"]:
        raise TargetMismatch(f"built for compute capability {target['capability']}, found {found}")


def map_weights(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """Every tensor of the weights files, memory-mapped on the CPU."""
    from safetensors import safe_open

    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("weights*.safetensors")):
        with safe_open(file, framework="pt", device=device) as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                weights[name] = handle.get_tensor(name)
    return weights

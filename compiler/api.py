"""The compiler from end to end: load, trace, passes, lower, write; and rebuilding for a target."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from smelt import __version__
from smelt.models.config import eos_ids
from smelt.models.skeleton import fake_parameters
from smelt.passes.dialect import smelt_name
from smelt.passes.program import Program
from smelt.passes.weights import Step
from smelt.runtime import manifest as manifests
from smelt.runtime.batch import BatchLayout
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.manifest import Manifest

from . import artifact, gate, lower, origins, portable
from .features import step_features
from .journal import Journals
from .loading import Loaded, load
from .manager import Controls, PassManager, Stage
from .numerics import NumericsCheck
from .options import CompileOptions
from .pipeline import PipelineConfig, installed_passes, load_pass, pipeline, portable_stages
from .proof import Proof, speed
from .quantization import quantize_stage
from .stored import quant_json
from .trace import check_once, export, program_from_export, refuse_unsupported
from .weights import bind

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    return None


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Stopped:
    """What the passes did in a compilation that was asked to end early; nothing was written."""

    passes: list[dict[str, Any]]


def compile_model(
    model: str | os.PathLike[str] | nn.Module,
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Artifact | Stopped:
    """Compile `model` (folder, hub name, or a transformers module) into the artifact `out`.

    options: the fields of `CompileOptions`. Returns `Stopped` when the pipeline was asked to stop
    before its end. Raises UserError and SmeltError; the artifact that was at `out` stays as it was.
    """
    settings = CompileOptions(**options)
    try:
        return _compile(model, Path(out).expanduser().absolute(), settings, progress or _silent)
    except _Stopped as stopped:
        return Stopped(stopped.records)


def _compile(
    model: str | os.PathLike[str] | nn.Module, out: Path, settings: CompileOptions, report: Progress
) -> Artifact:
    started = time.perf_counter()
    with artifact.replacing(out, settings.force or settings.partial) as folder:
        report("load", 0, 1)
        loaded = load(model, settings)
        report("trace", 0, 1)
        check_once(loaded.config, settings.trust_remote_code)
        program = _trace(loaded)
        program.target = settings.device
        journals = None
        if loaded.folder is not None:
            journals = Journals(loaded.folder, lambda count: report("resume", count, count))
        stages = _stages(settings, program, loaded, journals, report)
        proof = None
        if not settings.partial:
            proof = Proof(program, loaded.source, loaded.folder, settings.calib)
        portable_count = len(portable_stages(stages)[0])
        check = NumericsCheck(program, loaded.source) if settings.check_numerics else None
        controls = Controls(
            settings.skip,
            settings.stop_after,
            settings.pass_limit,
            settings.allow_fewer,
            settings.dump,
            settings.check_numerics,
        )
        manager = PassManager(stages, controls, check, report)
        manager.run(program, until=portable_count)
        if settings.partial:
            manager.run(program, start=portable_count)
            if journals is not None:
                journals.discard()
            raise _Stopped(program.records)
        _check_step(program)
        program.layout = _layout(program, settings)
        report("save", 0, 1)
        portable.save_portable(program, folder)
        origins.save(program, loaded.skeleton, loaded.config, folder)
        manager.run(program, start=portable_count)
        weight_bytes = artifact.write_weights(program, loaded.source, folder, report)
        manifest = _manifest(program, loaded, settings, weight_bytes)
        _lower(program, settings.backend, folder, manifest, report)
        if loaded.folder is not None:
            artifact.copy_tokenizer(loaded.folder, folder)
        artifact.seal(manifest, folder)
        report("prove", 0, 1)
        if proof is not None and settings.backend == "aoti":
            lossy = settings.lossy or manifest.quant["method"] != "none"
            manifest.quality = proof.quality(folder, lossy)
            manifest.speed = speed(folder)
        manifest.build["seconds"] = round(time.perf_counter() - started, 2)
        manifest.write(folder)
        if settings.gate:
            report("gate", 0, 1)
            trust = settings.trust_remote_code
            manifest.quality["gate"] = gate.hold(settings.gate, folder, loaded.folder, out, trust)
            manifest.write(folder)
    if journals is not None:
        journals.discard()
    return Artifact(out, manifest)


class _Stopped(Exception):
    """The pipeline ended where it was asked to; carries the records of the passes that ran."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        super().__init__()
        self.records = records


def _trace(loaded: Loaded) -> Program:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake_parameters(loaded.skeleton, mode)
    program = program_from_export(export(loaded.skeleton), loaded.skeleton, loaded.config)
    refuse_unsupported(program, loaded.config)
    bind(program.weights, loaded.stored, loaded.skeleton, loaded.name, loaded.quantized)
    return program


def _stages(
    settings: CompileOptions,
    program: Program,
    loaded: Loaded,
    journals: Journals | None,
    report: Progress,
) -> list[Stage]:
    extra = [load_pass(p) if isinstance(p, str) else p for p in settings.passes]
    quantize = quantize_stage(
        settings,
        loaded.source,
        loaded.folder,
        program.facts.max_position,
        report,
        loaded.quantized is not None,
        journals,
    )
    options: dict[str, dict[str, Any]] = {"insert-kv-cache": {"block_size": settings.block_size}}
    if settings.providers:
        options["choose-providers"] = {"overrides": tuple(settings.providers)}
    every = (*installed_passes(), *extra)
    asked = (settings.kv_cache, settings.features)
    return pipeline(PipelineConfig(settings.opt, quantize, every, options, *asked))


def _check_step(program: Program) -> None:
    """Raise UserError when a pass the engine cannot do without was skipped."""
    inputs = {entry.name for entry in program.inputs.values()}
    lacking = None
    if program.caches is None:
        lacking = "insert-kv-cache"
    elif "logits_rows" not in inputs:
        lacking = "keep-logits-rows"
    elif program.calls(torch.ops.smelt.sequence_length.default):
        lacking = "insert-rope-lengths"
    if lacking is not None:
        raise UserError(
            f"without the pass {lacking} there is no step to compile; "
            "add --stop-after to look at the graph without it"
        )


def _layout(program: Program, settings: CompileOptions) -> BatchLayout:
    context = program.facts.max_position
    return BatchLayout(
        max_tokens=settings.max_tokens,
        max_sequences=min(256, settings.max_tokens),
        max_blocks=-(-context // settings.block_size),
        max_rows=settings.max_tokens,
        max_position=context,
    )


def _manifest(
    program: Program, loaded: Loaded, settings: CompileOptions, weight_bytes: int
) -> Manifest:
    assert program.caches is not None and program.layout is not None
    config = loaded.config
    parameters = sum(p.numel() for p in loaded.skeleton.parameters())
    source_bytes = sum(spec.nbytes for spec in loaded.stored.values())
    return Manifest(
        model={
            "name": Path(loaded.name).name,
            "class": program.facts.model_class,
            "revision": settings.revision,
            "dtype": program.facts.dtype,
            "vocab_size": program.facts.vocab_size,
            "max_position": program.facts.max_position,
            "eos_token_id": eos_ids(config, loaded.generation),
            "bos_token_id": getattr(config, "bos_token_id", None),
            "parameters": parameters,
            "source_bytes": source_bytes,
            "weight_plan": program.weights.digest(),
            **step_features(program),
        },
        quant=quant_json(loaded.quantized.quantization)
        if loaded.quantized
        else settings.spec.to_json(),
        target=artifact.describe_target(settings.device),
        backend=settings.backend,
        cache=program.caches,
        layout=program.layout,
        constants={},
        layout_steps=layout_steps(program),
        passes=program.records,
        providers=program.notes("choose-providers"),
        memory={
            "weights_bytes": weight_bytes,
            "kv_bytes_per_token": program.caches.bytes_per_token(),
            "weight_bytes_per_token": bytes_per_token(program),
        },
        build={
            "smelt": __version__,
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "date": time.strftime("%Y-%m-%d"),
            "options": {k: str(v) for k, v in vars(settings).items() if k not in ("spec", "gate")},
        },
    )


def layout_steps(program: Program) -> list[dict[str, Any]]:
    """Steps that laid canonical weights out for providers, for the way back."""
    from smelt.passes.layouts import INVERSES

    return [s.to_json() for s in program.weights.steps if s.op in INVERSES]


def bytes_per_token(program: Program) -> int:
    """Bytes of weights one decode step reads: all but an embedding table used only for lookup."""
    total = 0
    for node in program.placeholders():
        name = program.weight_name(node)
        if name is None:
            continue
        lookups = [u for u in node.users if u.target is torch.ops.aten.embedding.default]
        if len(lookups) < len(node.users):
            total += int(program.weights.specs[name].nbytes * _share_read(node))
    return total


def _share_read(weight: fx.Node) -> float:
    """Of a layer's experts, one token reads those its router chose; of other weights, all."""
    for user in weight.users:
        name, args = smelt_name(user), cast(Any, user.args)
        if name in ("experts", "experts_dense") and weight in args[3:5]:
            return float(args[1].meta["val"].shape[-1] / args[3].meta["val"].shape[0])
        if name in ("experts_quantized", "experts_quantized_blocked") and weight in args[3:9]:
            return float(args[1].meta["val"].shape[-1] / args[11])
    return 1.0


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _lower(
    program: Program, backend: str, folder: Path, manifest: Manifest, report: Progress
) -> None:
    """Compile the step into folder/graphs and record its constants; ship the kernels it calls."""
    assert program.caches is not None
    graphs = folder / "graphs"
    graphs.mkdir()
    report("compile", 0, 1)
    if backend == "aoti":
        manifest.steps, manifest.constants = lower.compile_steps(program, folder)
    else:
        exported, manifest.constants = portable.export_with_inputs(program, program.target)
        portable.save(exported, graphs / "step.pt2")
    if program.target == "cpu" and any(p["provider"] == "cpu" for p in manifest.providers):
        from smelt.runtime.kernels import build as kernels

        (folder / "kernels").mkdir(exist_ok=True)
        shutil.copyfile(kernels.library_path(), folder / "kernels" / "smelt_cpu.so")


def rebuild(
    folder: Path | str, *, device: str = "cpu", progress: Progress | None = None
) -> Artifact:
    """Compile an artifact's portable program anew for this machine, in its place.

    Nothing is traced, calibrated or quantized again. Raises SmeltError when the folder cannot be
    written or its portable part is damaged.
    """
    folder = Path(folder).absolute()
    report = progress or _silent
    old = manifests.read(folder)
    program = portable.load_portable(folder)
    program.target = device
    from smelt.runtime.artifact import map_weights

    steps = [
        Step(s["op"], tuple(s["outputs"]), tuple(s["inputs"]), s["args"]) for s in old.layout_steps
    ]
    source = portable.LaidOutSource(map_weights(folder, "cpu"), steps)
    stages = pipeline(PipelineConfig("O2", None))
    PassManager(portable_stages(stages)[1], progress=report).run(program)
    with artifact.replacing(folder, force=True) as scratch:
        for path in folder.iterdir():
            if path.is_file() and not path.name.startswith(("weights", manifests.FILE_NAME)):
                shutil.copyfile(path, scratch / path.name)
        old.memory["weights_bytes"] = artifact.write_weights(program, source, scratch, report)
        old.target = artifact.describe_target(device)
        old.layout_steps = layout_steps(program)
        old.providers = program.notes("choose-providers")
        old.build["rebuilt"] = time.strftime("%Y-%m-%d")
        _lower(program, old.backend, scratch, old, report)
        artifact.seal(old, scratch)
    return Artifact(folder, old)


__all__ = ["Artifact", "SmeltError", "compile_model", "rebuild"]

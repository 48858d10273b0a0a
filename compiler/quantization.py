"""The quantization stage of a pipeline: the pass for a method, with its calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smelt.passes.base import Pass
from smelt.passes.quantize import (
    AwqOptions,
    CalibrationOptions,
    Fp8Options,
    GptqOptions,
    KeepQuantized,
    MixedOptions,
    PrequantizedOptions,
    QuantizeAwq,
    QuantizeFp8,
    QuantizeGptq,
    QuantizeMixed,
    QuantizeRtn,
    QuantizeSmoothQuant,
    QuantSpec,
    RtnOptions,
    SmoothQuantOptions,
)
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import UserError

from .journal import Journals
from .manager import Progress, Stage
from .options import CompileOptions

METHODS: dict[str, type[Pass]] = {
    "rtn": QuantizeRtn,
    "awq": QuantizeAwq,
    "gptq": QuantizeGptq,
    "smoothquant": QuantizeSmoothQuant,
    "fp8": QuantizeFp8,
    "mixed": QuantizeMixed,
}
# Options of the methods that may run text through the model.
_CALIBRATED: dict[str, type[CalibrationOptions]] = {
    "awq": AwqOptions,
    "gptq": GptqOptions,
    "smoothquant": SmoothQuantOptions,
    "fp8": Fp8Options,
    "mixed": MixedOptions,
}


def quantize_stage(
    settings: CompileOptions,
    source: TensorSource,
    folder: Path | None,
    context: int,
    progress: Progress,
    quantized: bool = False,
    journals: Journals | None = None,
) -> Stage | None:
    """The stage that `settings` ask for, or None without quantization.

    context: the model's, in tokens; calibration sequences are no longer. quantized: the checkpoint
    already is, and keeps what it has. journals: where calibration keeps its results meanwhile.

    Raises UserError when calibration is needed and the text or the tokenizer is missing.
    """
    if quantized:
        return Stage(KeepQuantized(), PrequantizedOptions(source))
    spec = settings.spec
    if spec.method == "none":
        return None
    if not spec.needs_calibration:
        return stage_for(spec)

    def calibrating(layer: str, done: int, total: int) -> None:
        progress("calibrate", done, total)

    samples = _calibration(settings, folder, context)
    return stage_for(spec, samples, source, calibrating, journals)


def stage_for(
    spec: QuantSpec,
    samples: Sequence[Sequence[int]] = (),
    source: TensorSource | None = None,
    progress: Progress | None = None,
    journals: Journals | None = None,
) -> Stage:
    """The pass of a method with its options. The rest is for calibrated ones."""
    calibrated = _CALIBRATED.get(spec.method)
    if calibrated is None:
        return Stage(METHODS[spec.method](), RtnOptions(spec))
    options = calibrated(spec, samples=samples, source=source, progress=progress, journal=journals)
    return Stage(METHODS[spec.method](), options)


def _calibration(settings: CompileOptions, folder: Path | None, context: int) -> Any:
    from .calibration_data import load_calibration

    if folder is None or not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"--quant {settings.spec.method} needs calibration text and so a tokenizer; "
            f"{folder or 'a module in memory'} has no tokenizer.json"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    return load_calibration(
        settings.calib,
        tokenizer,
        settings.calib_samples,
        min(settings.calib_seqlen, context),
        seed=0,
        model_folder=folder,
    )

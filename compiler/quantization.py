"""The quantization stage of a pipeline: the pass for a method, with its calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smelt.passes.base import Pass
from smelt.passes.quantize import (
    AwqOptions,
    Fp8Options,
    QuantizeAwq,
    QuantizeFp8,
    QuantizeRtn,
    QuantizeSmoothQuant,
    RtnOptions,
    SmoothQuantOptions,
)
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import UserError

from .manager import Progress, Stage
from .options import CompileOptions

METHODS: dict[str, type[Pass]] = {
    "rtn": QuantizeRtn,
    "awq": QuantizeAwq,
    "smoothquant": QuantizeSmoothQuant,
    "fp8": QuantizeFp8,
}
# Options of the methods that may run text through the model.
_CALIBRATED: dict[str, type[Any]] = {
    "awq": AwqOptions,
    "smoothquant": SmoothQuantOptions,
    "fp8": Fp8Options,
}


def quantize_stage(
    settings: CompileOptions,
    source: TensorSource,
    folder: Path | None,
    context: int,
    progress: Progress,
) -> Stage | None:
    """The stage that `settings` ask for, or None without quantization.

    context: the model's, in tokens; calibration sequences are no longer.

    Raises UserError when calibration is needed and the text or the tokenizer is missing.
    """
    if settings.spec.method == "none":
        return None
    if settings.spec.method == "rtn":
        return Stage(QuantizeRtn(), RtnOptions(settings.spec))
    quantizer, options = METHODS[settings.spec.method], _CALIBRATED[settings.spec.method]
    if not settings.spec.needs_calibration:
        return Stage(quantizer(), options(settings.spec))
    calibration = _calibration(settings, folder, context)

    def calibrating(layer: str, done: int, total: int) -> None:
        progress("calibrate", done, total)

    given = options(
        settings.spec, samples=calibration.token_lists, source=source, progress=calibrating
    )
    return Stage(quantizer(), given)


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

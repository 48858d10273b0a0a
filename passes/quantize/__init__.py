"""Quantization: linear layers with packed weights, by method (how scales are found) and format."""

from __future__ import annotations

from .awq import AwqOptions, QuantizeAwq
from .calibrate import CalibrationOptions
from .fp8 import Fp8Options, QuantizeFp8
from .gptq import GptqOptions, QuantizeGptq
from .mixed import MixedOptions, QuantizeMixed
from .prequantized import KeepQuantized, PrequantizedOptions
from .rtn import QuantizeRtn, RtnOptions
from .smoothquant import QuantizeSmoothQuant, SmoothQuantOptions
from .spec import QuantSpec, Scheme

__all__ = [
    "AwqOptions",
    "CalibrationOptions",
    "Fp8Options",
    "GptqOptions",
    "KeepQuantized",
    "MixedOptions",
    "PrequantizedOptions",
    "QuantSpec",
    "QuantizeAwq",
    "QuantizeFp8",
    "QuantizeGptq",
    "QuantizeMixed",
    "QuantizeRtn",
    "QuantizeSmoothQuant",
    "RtnOptions",
    "Scheme",
    "SmoothQuantOptions",
]

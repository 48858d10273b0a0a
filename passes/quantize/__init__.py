"""Quantization: linear layers with packed weights, by method (how scales are found) and format."""

from __future__ import annotations

from .awq import AwqOptions, QuantizeAwq
from .prequantized import KeepQuantized, PrequantizedOptions
from .rtn import QuantizeRtn, RtnOptions
from .spec import QuantSpec, Scheme

__all__ = [
    "AwqOptions",
    "KeepQuantized",
    "PrequantizedOptions",
    "QuantSpec",
    "QuantizeAwq",
    "QuantizeRtn",
    "RtnOptions",
    "Scheme",
]

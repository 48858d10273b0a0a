"""Quantization: linear layers with packed weights, by method (how scales are found) and format."""

from __future__ import annotations

from .awq import AwqOptions, QuantizeAwq
from .rtn import QuantizeRtn, RtnOptions
from .spec import QuantSpec, Scheme

__all__ = ["AwqOptions", "QuantSpec", "QuantizeAwq", "QuantizeRtn", "RtnOptions", "Scheme"]

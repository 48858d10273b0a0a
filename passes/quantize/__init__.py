"""Quantization: linear layers with packed weights, by method (how scales are found) and format."""

from __future__ import annotations


from .rtn import QuantizeRtn, RtnOptions
from .spec import QuantSpec, Scheme

__all__ = ["QuantSpec", "QuantizeRtn", "RtnOptions", "Scheme"]

"""Importing this registers every operator that launches a Triton kernel."""

from __future__ import annotations

from . import (  # noqa: F401
    attention,
    experts,
    experts_int4,
    kv_write,
    linear_fp8,
    linear_fp8_weight,
    linear_int4,
    linear_int8,
    linear_w8a8,
    norms,
    quantize,
)
from .launch import INTERPRETED

__all__ = ["INTERPRETED"]

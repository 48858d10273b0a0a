"""Compiled artifacts for the whole folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.artifacts import DEMO, smelt


@pytest.fixture(scope="session")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, AWQ int4, through AOTInductor."""
    out = tmp_path_factory.mktemp("awq") / "demo"
    smelt("compile", DEMO, "-o", out, "--quant", "awq", "--calib-samples", "16")
    return out


@pytest.fixture(scope="session")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, not quantized, through AOTInductor."""
    out = tmp_path_factory.mktemp("fp32") / "demo"
    smelt("compile", DEMO, "-o", out, "--dtype", "fp32")
    return out

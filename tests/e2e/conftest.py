"""Compiled artifacts for the whole folder, made once for all processes that run its tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from helpers.artifacts import DEMO, smelt


def made_once(factory: pytest.TempPathFactory, name: str, *arguments: str | Path) -> Path:
    """The artifact that `smelt compile ARGUMENTS` makes; tests copy what they change."""
    common = factory.getbasetemp()
    if common.name.startswith("popen-"):  # of one of several processes
        common = common.parent
    out = common / name
    with FileLock(common / f"{name}.lock"):
        if not out.exists():
            smelt("compile", *arguments, "-o", out)
    return out


@pytest.fixture(scope="session")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, AWQ int4, through AOTInductor."""
    return made_once(tmp_path_factory, "awq", DEMO, "--quant", "awq", "--calib-samples", "16")


@pytest.fixture(scope="session")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, not quantized, through AOTInductor."""
    return made_once(tmp_path_factory, "fp32", DEMO, "--dtype", "fp32")


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smaller demo model in float32."""
    arguments = (f"{DEMO}-draft", "--dtype", "fp32", "--backend", "eager")
    return made_once(tmp_path_factory, "draft", *arguments)

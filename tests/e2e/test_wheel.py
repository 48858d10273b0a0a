"""The wheel holds every package and runs outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.artifacts import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    # Built from a copy, because setuptools leaves its build folder in the source tree.
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, timeout=300)
    return next(out.glob("*.whl"))


def test_every_folder_and_data_file_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    for folder in ("cli", "compiler", "models", "passes", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"smelt/{path.relative_to(ROOT)}" in packed
    for name in (
        "smelt/py.typed",
        "smelt/models/demo/smelt-demo/model.safetensors",
        "smelt/models/demo/smelt-demo-medusa/medusa_lm_head.safetensors",
        "smelt/models/calibration/builtin.txt",
        "smelt/runtime/kernels/cpu/isa.cpp",
    ):
        assert name in packed
    assert not any(name.startswith("tests/") for name in packed)


def test_it_runs_outside_the_checkout(wheel: Path, tmp_path: Path, awq: Path) -> None:
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    program = (
        "import smelt\n"
        f"assert smelt.__file__.startswith({str(place)!r}), smelt.__file__\n"
        f"llm = smelt.load({str(awq)!r})\n"
        "print(llm.generate(['Hello'], smelt.SamplingParams(max_tokens=4))[0].token_ids)\n"
        "from smelt.compiler.api import compile_model\n"
        "from smelt.compiler.calibration_data import BUILTIN\n"
        "assert BUILTIN.is_file()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(place)}
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=300
    )

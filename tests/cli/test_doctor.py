"""`smelt doctor`: always an answer, whatever is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smelt.cli import doctor
from smelt.cli.app import main
from smelt.runtime import machine


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["doctor", *arguments])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--json"))
    assert set(found) == {"machine", "software", "can", "problems"}
    assert found["machine"]["memory_bytes"] > 0
    assert found["software"]["packages"]["torch"]
    assert "eager" in found["can"]["backends"]


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys)
    for word in ("processor", "compiler", "AOTInductor", "fastest"):
        assert word in out


def test_nothing_there_is_still_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "compiler", lambda: None)
    monkeypatch.setattr(machine, "package_version", lambda name: None)
    monkeypatch.setattr(machine.Path, "read_text", lambda self: (_ for _ in ()).throw(OSError()))
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "absent" / "cache"))
    found: dict[str, Any] = json.loads(run(capsys, "--json"))
    assert found["can"]["aoti"] is False
    assert found["can"]["backends"] == ["eager"]
    problems = [p["problem"] for p in found["problems"]]
    assert any("no C++ compiler" in p for p in problems)
    assert all(p["fix"] for p in found["problems"])
    assert "What is missing" in run(capsys)


def test_a_compiler_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    found = json.loads(run(capsys, "--json"))
    assert found["can"]["aoti"] is False
    assert "no such header" in found["can"]["aoti_reason"]


def test_a_driver_without_a_cuda_torch() -> None:
    hardware = {
        "cuda": [],
        "cache_free_bytes": 1 << 40,
        "cache_folder": "/",
        "instruction_sets": ["avx2"],
    }
    software = {
        "compiler": {"command": "g++", "version": "", "error": None},
        "packages": dict.fromkeys(doctor.PACKAGES, "1"),
        "nvidia_driver": True,
        "kernels": {"compiled": True, "isa": "avx2", "path": "x"},
    }
    problems = doctor.problems(hardware, software)
    assert "no CUDA device" in problems[0]["problem"]
    assert doctor.abilities(hardware, software)["devices"] == ["cpu"]

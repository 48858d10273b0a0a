"""What may happen to an artifact after it was made: moved, cut short, altered, another machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.artifacts import one_line, smelt


@pytest.fixture
def copied(awq: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(awq, tmp_path / "moved"))


def tokens(folder: Path, **environment: str) -> list[int]:
    done = smelt("generate", folder, "Hello! How are you?", "-n", "12", "--json", **environment)
    ids: list[int] = json.loads(done.stdout)["outputs"][0]["token_ids"]
    return ids


def edit(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    for key, value in change.items():
        if isinstance(value, dict):
            data[key].update(value)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def test_moved_to_another_place_and_user(awq: Path, copied: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    moved = tokens(copied, HOME=str(home), SMELT_CACHE=str(home / "cache"))
    assert moved == tokens(awq)


def test_a_truncated_file_is_named(copied: Path) -> None:
    path = copied / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    line = one_line(smelt("generate", copied, "x", code=1).stderr)
    assert "weights.safetensors" in line and "truncated" in line


def test_an_altered_file_is_named(copied: Path) -> None:
    path = copied / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "altered" in one_line(smelt("generate", copied, "x", code=1).stderr)


def test_a_newer_schema_is_refused(copied: Path) -> None:
    edit(copied, {"schema": 99})
    assert "newer" in one_line(smelt("generate", copied, "x", code=2).stderr)


def test_another_torch_or_processor_rebuilds_with_a_notice(awq: Path, copied: Path) -> None:
    before = tokens(awq)
    edit(copied, {"target": {"isa": ["amx_of_the_future"], "torch": "2.13.0"}})
    done = smelt("generate", copied, "Hello! How are you?", "-n", "12", "--json")
    assert "amx_of_the_future" in done.stderr and "rebuilding" in done.stderr
    assert json.loads(done.stdout)["outputs"][0]["token_ids"] == before
    assert "rebuilding" not in smelt("generate", copied, "x", "-n", "1").stderr


def test_force_is_needed_to_replace_and_a_failure_keeps_the_old(copied: Path) -> None:
    from helpers.artifacts import DEMO

    before = (copied / "manifest.json").read_bytes()
    line = one_line(smelt("compile", DEMO, "-o", copied, code=2).stderr)
    assert "--force" in line
    smelt(
        "compile", DEMO, "-o", copied, "--force", "--calib", "nowhere.txt", "--quant", "awq", code=2
    )
    assert (copied / "manifest.json").read_bytes() == before
    assert [p.name for p in copied.parent.iterdir() if p.name.startswith(".")] == []

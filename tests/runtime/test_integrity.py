"""Files of an artifact: hashed, and refused by name when they are not what was written."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from smelt.runtime import integrity
from smelt.runtime.integrity import IntegrityError, describe, digest, verify


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache in a folder of the test's own."""
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "verified.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "OUT"
    (folder / "graphs").mkdir(parents=True)
    (folder / "graphs" / "step.pt2").write_bytes(b"code")
    (folder / "weights.safetensors").write_bytes(bytes(1000))
    return folder


def files(folder: Path) -> dict[str, dict[str, Any]]:
    names = ("graphs/step.pt2", "weights.safetensors")
    return {name: describe(folder / name) for name in names}


def refused(folder: Path, listed: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(IntegrityError, match=message) as caught:
        verify(folder, listed)
    assert "\n" not in str(caught.value)


def test_a_digest_is_sha256(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_CHUNK", 7)
    path = folder / "weights.safetensors"
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_untouched_folder_passes_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    listed = files(folder)
    verify(folder, listed)
    moved = folder.rename(tmp_path / "moved")
    verify(moved, listed)


def test_what_is_wrong_is_named(folder: Path) -> None:
    listed = files(folder)
    weights = folder / "weights.safetensors"
    weights.write_bytes(bytes(999))
    refused(folder, listed, "weights.safetensors has 999 bytes, 1000 were written; it is truncated")
    weights.write_bytes(bytes(999) + b"\x01")
    refused(folder, listed, "weights.safetensors was altered after it was written")
    weights.unlink()
    refused(folder, listed, "weights.safetensors is missing; copy the whole folder again")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "graphs/../../secret"])
def test_a_manifest_cannot_name_files_outside(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    refused(folder, {name: {"bytes": 1, "sha256": ""}}, "outside the artifact")


def test_a_large_file_is_hashed_once(
    folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "_ALWAYS_HASHED", 100)
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    listed = files(folder)
    monkeypatch.setattr(integrity, "digest", counting)
    verify(folder, listed)
    verify(folder, listed)
    assert hashed.count("weights.safetensors") == 1 and hashed.count("step.pt2") == 2
    assert len(json.loads(notes.read_text())) == 1


def test_a_large_file_that_changed_is_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "_ALWAYS_HASHED", 100)
    listed = files(folder)
    verify(folder, listed)
    weights = folder / "weights.safetensors"
    weights.write_bytes(b"\x01" * 1000)
    later = weights.stat().st_mtime_ns + 1_000_000
    os.utime(weights, ns=(later, later))
    refused(folder, listed, "was altered")
    refused(folder, listed, "was altered")


def test_another_manifest_over_the_same_file_is_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "_ALWAYS_HASHED", 100)
    listed = files(folder)
    verify(folder, listed)
    listed["weights.safetensors"]["sha256"] = "0" * 64
    refused(folder, listed, "was altered")


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_damaged_notes_cost_a_hash_and_nothing_else(folder: Path, notes: Path, text: str) -> None:
    notes.parent.mkdir()
    notes.write_text(text)
    verify(folder, files(folder))


def test_a_cache_that_cannot_be_written_is_no_error(
    folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "_ALWAYS_HASHED", 100)
    notes.parent.write_text("a file where the folder should be")
    verify(folder, files(folder))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMELT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert integrity.cache_folder() == Path("/x/smelt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert integrity.cache_folder() == Path.home() / ".cache" / "smelt"

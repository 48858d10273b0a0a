"""Journals: entries whole or absent, one for each state of what they depend on, gone when done."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.compiler.journal import KEPT_DAYS, Journal, Journals

FIELDS: dict[str, Any] = {
    "factor": torch.tensor([0.5, 2.0]),
    "q": torch.arange(6, dtype=torch.uint8).reshape(2, 3).T,
    "scales": torch.ones(2, dtype=torch.bfloat16),
    "error": 0.1 + 0.2,
    "note": "a word",
    "missing": None,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_fields_come_back_as_they_were(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    name = "model.layers.0/mlp down%.weight@1"
    journal[name] = FIELDS
    assert list(journal) == [name] and len(journal) == 1 and name in journal
    found = journal[name]
    assert set(found) == set(FIELDS)
    for key, value in FIELDS.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype and torch.equal(found[key], value)
        else:
            assert found[key] == value
    del journal[name]
    assert len(journal) == 0 and journal.get(name) is None
    with pytest.raises(KeyError):
        del journal[name]


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"x" * 100])
def test_an_entry_that_is_damaged_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    journal = Journal(tmp_path)
    journal["w"] = FIELDS
    next(tmp_path.glob("*.safetensors")).write_bytes(content)
    assert journal.get("w") is None
    journal["w"] = FIELDS
    assert journal["w"]["note"] == "a word"


def test_what_was_begun_is_found_again_until_it_is_complete(checkpoint: Path, cache: Path) -> None:
    counts: list[int] = []
    first = Journals(checkpoint, counts.append)
    first("calibration")["w"] = FIELDS
    second = Journals(checkpoint, counts.append)
    assert second("calibration")["w"]["note"] == "a word"
    assert len(second("another calibration")) == 0
    assert counts == [1]
    second.discard()
    assert list((cache / "calibration").iterdir()) == []


def test_a_changed_checkpoint_or_torch_begins_anew(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journals(checkpoint)("calibration")["w"] = FIELDS
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "99.0")
        assert len(Journals(checkpoint)("calibration")) == 0
    assert len(Journals(checkpoint)("calibration")) == 1
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    assert len(Journals(checkpoint)("calibration")) == 0


def test_journals_nobody_came_back_for_go(checkpoint: Path) -> None:
    journal = Journals(checkpoint)("old")
    journal["w"] = FIELDS
    long_ago = time.time() - (KEPT_DAYS + 1) * 86400
    os.utime(journal.folder, (long_ago, long_ago))
    Journals(checkpoint)("new")
    assert not journal.folder.exists()

"""The manifest: what is written is read back, and what cannot be read is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.manifests import sample_manifest

from smelt.runtime import manifest
from smelt.runtime.batch import CONTRACT_VERSION
from smelt.runtime.manifest import FILE_NAME, SCHEMA_VERSION, ManifestError


def write(folder: Path, **changes: Any) -> Path:
    """A manifest in `folder` with keys replaced; a key given as None is removed."""
    sample_manifest().write(folder)
    path = folder / FILE_NAME
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        manifest.read(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = sample_manifest(files={"graphs/step.pt2": {"bytes": 3, "sha256": "ab"}})
    written.write(tmp_path)
    assert manifest.read(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert json.loads(json.dumps(written.to_json()))["cache"]["block_size"] == 16


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no artifact .*nowhere; make one with: smelt compile")
    refused(tmp_path, "is not an artifact \\(no manifest.json\\); make one with")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "{}", '{"schema": "1"}'])
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    refused(tmp_path, "is damaged")


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "is damaged")


def test_another_schema(tmp_path: Path) -> None:
    refused(write(tmp_path, schema=SCHEMA_VERSION + 1), "is newer than this smelt reads .*update")
    refused(write(tmp_path, schema=SCHEMA_VERSION - 1), "is older .*compile the model again")


def test_a_newer_schema_is_said_before_anything_else_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({"schema": 99, "unknown": 1}))
    refused(tmp_path, "schema 99 is newer")


def test_another_contract_between_graph_and_engine(tmp_path: Path) -> None:
    for other in (CONTRACT_VERSION - 1, CONTRACT_VERSION + 1):
        refused(write(tmp_path, contract=other), f"contract is {other}, this smelt's engine")
    refused(write(tmp_path, contract=None), "contract is None")


@pytest.mark.parametrize("key", ["model", "target", "cache", "layout", "files", "providers"])
def test_a_missing_entry_is_named(tmp_path: Path, key: str) -> None:
    refused(write(tmp_path, **{key: None}), f"is damaged \\(no {key}\\)")


@pytest.mark.parametrize("key", ["cache", "layout"])
def test_an_entry_of_another_kind(tmp_path: Path, key: str) -> None:
    refused(write(tmp_path, **{key: {"block_size": 16}}), "is damaged .*lacks")
    refused(write(tmp_path, **{key: 3}), "is damaged")


def test_unknown_entries_are_ignored(tmp_path: Path) -> None:
    assert manifest.read(write(tmp_path, note="by hand")).model["name"] == "sample"


FILES = {
    "graphs/few.pt2": {"bytes": 1, "sha256": ""},
    "graphs/step.pt2": {"bytes": 1, "sha256": ""},
}
FEW = {"file": "graphs/few.pt2", "max_tokens": 16, "max_query": 16}
ANY = {"file": "graphs/step.pt2", "max_tokens": 0, "max_query": 0}


def test_the_packages_of_a_step_are_kept(tmp_path: Path) -> None:
    written = sample_manifest(files=FILES, steps=[FEW, ANY])
    written.write(tmp_path)
    assert manifest.read(tmp_path) == written
    # An artifact of one package does not list it.
    assert manifest.read(write(tmp_path, steps=None)).steps == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({}, "steps is no list"),
        ([ANY, 3], "3 of steps names no file of the artifact"),
        ([{**FEW, "file": "graphs/other.pt2"}, ANY], "names no file of the artifact"),
        ([{**FEW, "file": "../few.pt2"}, ANY], "names no file of the artifact"),
        ([{**FEW, "max_query": -1}, ANY], "max_query of graphs/few.pt2 is -1"),
        ([{**FEW, "max_tokens": "16"}, ANY], "max_tokens of graphs/few.pt2 is '16'"),
        ([{**FEW, "max_tokens": True}, ANY], "max_tokens of graphs/few.pt2 is True"),
        ([{"file": "graphs/few.pt2", "max_tokens": 16}, ANY], "max_query of .* is None"),
        ([ANY, FEW], "graphs/few.pt2, the last of steps, has bounds"),
    ],
)
def test_packages_that_cannot_be_chosen_from(tmp_path: Path, steps: Any, message: str) -> None:
    refused(write(tmp_path, steps=steps, files=FILES), f"is damaged \\(.*{message}")

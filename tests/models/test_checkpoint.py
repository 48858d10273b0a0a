"""Safetensors folders: names, shapes and dtypes from the headers, and folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smelt.models.checkpoint import Checkpoint
from smelt.runtime.errors import UserError


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def sharded(folder: Path) -> Path:
    save_file({"a": torch.ones(2, 3)}, folder / "one.safetensors")
    save_file({"b": torch.arange(4, dtype=torch.int8)}, folder / "two.safetensors")
    save_file({"c": torch.ones(1)}, folder / "unlisted.safetensors")
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn],
)
def test_tensors_come_as_they_were_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(6).view(2, 3).to(dtype)
    save_file({"a": value}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    entry = checkpoint.entries["a"]
    assert (entry.shape, entry.dtype) == ((2, 3), dtype)
    found = checkpoint.tensor("a")
    assert found.dtype == dtype and torch.equal(found.float(), value.float())
    with pytest.raises(KeyError):
        checkpoint.tensor("b")


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path))
    assert set(checkpoint.entries) == {"a", "b"}
    assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert checkpoint.nbytes == sum(file.stat().st_size for file in checkpoint.files)
    assert torch.equal(checkpoint.tensor("a"), torch.ones(2, 3))


def test_tensors_are_mapped_and_not_read(tmp_path: Path) -> None:
    """Opened twice, a tensor lies in the same file pages: its bytes are the file's."""
    save_file({"a": torch.zeros(1024, 1024)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    tensor = checkpoint.tensor("a")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps here")
    for line in maps.read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= tensor.data_ptr() < int(end, 16):
            assert line.endswith("model.safetensors")
            return
    pytest.fail("the tensor lies in no mapping")


@pytest.mark.parametrize("keep", [0, 4, 30, 200])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors is not a complete safetensors file .*download it again")


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    refused(tmp_path, "index.json names two.safetensors, which is not in")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, "which is not in")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "is not a safetensors index")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, "has a configuration but no weights")


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin, a pickle that smelt does not load; convert")


def test_a_dtype_it_cannot_read_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(tmp_path, "(dtype C64|not a complete safetensors file)")

"""Looking into a torch.export archive before torch does."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from smelt.runtime.archive import ArchiveError, check
from smelt.runtime.exported import ExportedStep


class Linear(nn.Module):
    def forward(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ weight


def saved(path: Path, keep_inputs: bool = False) -> Path:
    exported = torch.export.export(Linear(), (torch.ones(3, 3), torch.ones(2, 3)))
    if not keep_inputs:
        exported._example_inputs = None
    torch.export.save(exported, path)
    return path


def archive(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr("a/" + name.replace("__", "/").replace("_dot_", "."), content)
    return path


def test_what_we_write_passes(tmp_path: Path) -> None:
    check(saved(tmp_path / "p.pt2"))


def test_torchs_own_sample_inputs_are_pickled_and_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="holds pickled sample inputs, which smelt never writes"):
        check(saved(tmp_path / "p.pt2", keep_inputs=True))


@pytest.mark.parametrize("name", ["weights__model.pkl", "x_dot_pt", "deep__er__data.pickle"])
def test_a_pickle_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "p.pt2", **{name.replace(".", "_dot_"): b"\x80\x02."})
    with pytest.raises(ArchiveError, match="holds pickled"):
        check(path)


@pytest.mark.parametrize("pickled", [True, False])
def test_entries_marked_as_pickled_are_refused(tmp_path: Path, pickled: bool) -> None:
    config = json.dumps({"config": {"w": {"use_pickle": pickled}, "v": {"use_pickle": False}}})
    name = "data__weights__model_weights_config_dot_json"
    path = archive(tmp_path / "p.pt2", **{name: config.encode()})
    if pickled:
        with pytest.raises(ArchiveError, match="holds pickled weights or constants"):
            check(path)
    else:
        check(path)


@pytest.mark.parametrize("content", [b"[1, 2]", b"{", b'{"config": 3}', b'{"config": {"w": 1}}'])
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    name = "data__weights__model_weights_config_dot_json"
    with pytest.raises(ArchiveError):
        check(archive(tmp_path / "p.pt2", **{name: content}))


@pytest.mark.parametrize("content", [None, b"", b"no zip"])
def test_what_is_no_archive_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"p.pt2 is not a torch.export archive") as caught:
        check(path)
    assert "\n" not in str(caught.value)


def test_an_exported_step_runs_with_its_weights_first(tmp_path: Path) -> None:
    weight, x = torch.randn(3, 3), torch.randn(2, 3)
    step = ExportedStep(saved(tmp_path / "p.pt2"), {"weight": weight, "other": x}, "eager")
    torch.testing.assert_close(step.run([x]), x @ weight)


def test_an_exported_step_is_checked_before_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError):
        ExportedStep(saved(tmp_path / "p.pt2", keep_inputs=True), {}, "eager")

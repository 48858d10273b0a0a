"""Writing an artifact: all of it or nothing, and never over something that is not ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.manifests import sample_manifest
from helpers.tiny import Subject, Toy, program_of
from safetensors.torch import load_file

from smelt.compiler import artifact
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.integrity import describe
from smelt.runtime.manifest import FILE_NAME


def silent(stage: str, done: int, total: int) -> None:
    return None


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "OUT"


def put(out: Path, text: str, force: bool = False) -> None:
    with artifact.replacing(out, force) as folder:
        (folder / FILE_NAME).write_text(text)


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name != out.name)


def test_the_folder_appears_when_all_is_written(out: Path) -> None:
    with artifact.replacing(out, False) as folder:
        (folder / FILE_NAME).write_text("new")
        assert not out.exists()
        assert folder.parent == out.parent, "a rename must not cross file systems"
    assert (out / FILE_NAME).read_text() == "new"
    assert left_beside(out) == []


def test_the_folder_is_readable_by_others(out: Path) -> None:
    put(out, "new")
    assert out.stat().st_mode & 0o777 == 0o755


def test_an_artifact_is_replaced_only_by_force(out: Path) -> None:
    put(out, "old")
    with pytest.raises(UserError, match="already holds an artifact; pass --force to replace it"):
        put(out, "new")
    assert (out / FILE_NAME).read_text() == "old"
    put(out, "new", force=True)
    assert (out / FILE_NAME).read_text() == "new"
    assert left_beside(out) == []


def test_something_else_is_not_replaced_even_by_force(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else than an artifact"):
        put(out, "new", force=True)
    assert (out / "thesis.tex").exists()
    with pytest.raises(UserError, match="is a file; name a folder"):
        put(out / "thesis.tex", "new", force=True)


def test_an_empty_folder_is_taken(out: Path) -> None:
    out.mkdir(parents=True)
    put(out, "new")
    assert (out / FILE_NAME).read_text() == "new"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUT cannot be written: ") as caught:
        put(tmp_path / "file" / "OUT", "new")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)])
def test_whatever_stops_the_writing_the_old_artifact_stays(out: Path, error: BaseException) -> None:
    put(out, "old")
    with pytest.raises(type(error)), artifact.replacing(out, True) as folder:
        (folder / FILE_NAME).write_text("half")
        raise error
    assert (out / FILE_NAME).read_text() == "old"
    assert left_beside(out) == []


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_safetensors(*_: Any, **__: Any) -> None:
    from safetensors import SafetensorError

    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("raising", [full, full_for_safetensors])
def test_a_full_disk_is_one_line_and_leaves_the_old_artifact(
    out: Path, monkeypatch: pytest.MonkeyPatch, raising: Any
) -> None:
    put(out, "old")
    subject = program_of(Toy())
    monkeypatch.setattr(artifact, "save_file", raising)
    with (
        pytest.raises(SmeltError, match=r"the disk of .* is full; nothing was kept") as caught,
        artifact.replacing(out, True) as folder,
    ):
        artifact.write_weights(subject.program, subject.source, folder, silent)
    assert "\n" not in str(caught.value)
    assert (out / FILE_NAME).read_text() == "old"
    assert left_beside(out) == []


def test_a_writer_that_gives_no_reason_is_understood_by_the_space_left(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own writer only says that writing failed."""
    put(out, "old")
    usage = SimpleNamespace(total=1, used=1, free=0)
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SmeltError, match="is full"), artifact.replacing(out, True):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    with pytest.raises(UserError, match="not about the disk"), artifact.replacing(out, True):
        raise UserError("not about the disk")
    assert (out / FILE_NAME).read_text() == "old"


def test_a_rename_that_fails_puts_the_old_artifact_back(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(out, "old")
    replace = os.replace
    calls = []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="input/output"):
        put(out, "new", force=True)
    assert (out / FILE_NAME).read_text() == "old"


@pytest.fixture
def subject() -> Subject:
    return program_of(Toy())


def test_weights_are_what_the_plan_makes(subject: Subject, tmp_path: Path) -> None:
    written = artifact.write_weights(subject.program, subject.source, tmp_path, silent)
    stored = load_file(tmp_path / "weights.safetensors")
    assert set(stored) == {"embed.weight", "head.weight"}
    assert written == sum(value.nbytes for value in stored.values())
    for name, value in stored.items():
        assert torch.equal(value, subject.source.tensor(name))


def test_large_weights_are_cut_into_files(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "SHARD_BYTES", 100)
    artifact.write_weights(subject.program, subject.source, tmp_path, silent)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["weights-00000.safetensors", "weights-00001.safetensors"]


def test_views_of_one_tensor_can_be_stored(subject: Subject, tmp_path: Path) -> None:
    """A plan may yield views, and safetensors refuses tensors that share storage."""
    table = torch.randn(2 * 37, 16)

    class Halves:
        def tensor(self, name: str) -> torch.Tensor:
            return table[:37] if name == "embed.weight" else table[37:]

    artifact.write_weights(subject.program, Halves(), tmp_path, silent)
    stored = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(stored["head.weight"], table[37:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named(subject: Subject, tmp_path: Path, bad: float) -> None:
    subject.source._state["head.weight"][3, 4] = bad
    with pytest.raises(SmeltError, match=r"weight head.weight holds NaN or infinity"):
        artifact.write_weights(subject.program, subject.source, tmp_path, silent)


def test_the_tokenizer_is_copied_as_it_is(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        (model / name).write_text(name)
    artifact.copy_tokenizer(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    assert (folder / "tokenizer.json").read_text() == "tokenizer.json"


def test_the_seal_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    manifest = sample_manifest()
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "step.pt2").write_bytes(b"code")
    artifact.seal(manifest, tmp_path)
    assert manifest.files == {"graphs/step.pt2": describe(tmp_path / "graphs" / "step.pt2")}
    assert (tmp_path / FILE_NAME).is_file()


def test_the_target_names_what_the_code_needs() -> None:
    target = artifact.describe_target("cpu")
    assert target["device"] == "cpu" and target["torch"] == torch.__version__.split("+")[0]
    assert isinstance(target["isa"], list) and "-" in target["machine"]

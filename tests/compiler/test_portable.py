"""The portable program: saved and loaded it computes the same, and nothing in it is pickled."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.check_pass import logits_of
from helpers.tiny import Subject, tiny_program

from smelt.compiler import portable
from smelt.compiler.manager import PassManager, Stage
from smelt.compiler.pipeline import PipelineConfig, pipeline, portable_stages
from smelt.passes.dialect import verify
from smelt.passes.layouts import INVERSES
from smelt.passes.program import Dialect
from smelt.passes.quantize.rtn import QuantizeRtn, RtnOptions
from smelt.passes.quantize.spec import QuantSpec
from smelt.passes.weights import Step
from smelt.runtime.archive import ArchiveError, check
from smelt.runtime.batch import BatchLayout
from smelt.runtime.errors import SmeltError


class Held:
    """Tensors by name."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def cached(family: str) -> Subject:
    subject = tiny_program(family)
    quantize = Stage(QuantizeRtn(), RtnOptions(QuantSpec("rtn", format="int4", group_size=16)))
    stages = portable_stages(pipeline(PipelineConfig("O2", quantize)))[0]
    PassManager(stages).run(subject.program)
    subject.program.layout = BatchLayout(64, 4, 8, 64, 128)
    return subject


@pytest.fixture(scope="module")
def subject() -> Subject:
    return cached("llama")


@pytest.fixture(scope="module")
def folder(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable")
    portable.save_portable(subject.program, folder)
    return folder


@pytest.fixture
def weights(subject: Subject) -> dict[str, torch.Tensor]:
    program = subject.program
    return dict(program.weights.materialize(program.used_weights(), subject.source))


def test_loaded_it_is_the_same_program(
    subject: Subject, folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    loaded = portable.load_portable(folder)
    verify(loaded)
    assert loaded.dialect is Dialect.CACHED
    assert loaded.caches == subject.program.caches and loaded.layout == subject.program.layout
    assert loaded.facts == subject.program.facts
    assert set(loaded.used_weights()) == set(weights)
    expected = logits_of(subject.program, subject.source, subject.ids)
    torch.testing.assert_close(logits_of(loaded, Held(weights), subject.ids), expected)


def test_loaded_it_can_be_bound_to_a_target(
    subject: Subject, folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    loaded = portable.load_portable(folder)
    PassManager(portable_stages(pipeline(PipelineConfig()))[1]).run(loaded)
    expected = logits_of(subject.program, subject.source, subject.ids)
    torch.testing.assert_close(logits_of(loaded, Held(weights), subject.ids), expected)


def test_weights_laid_out_for_a_kernel_are_turned_back(
    folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    """An artifact holds blocked weights; rebuilding it needs the canonical ones."""
    loaded = portable.load_portable(folder)
    PassManager(portable_stages(pipeline(PipelineConfig()))[1]).run(loaded)
    stored = dict(loaded.weights.materialize(loaded.used_weights(), Held(weights)))
    steps = [
        Step(s.op, s.outputs, s.inputs, dict(s.args))
        for s in loaded.weights.steps
        if s.op in INVERSES
    ]
    source = portable.LaidOutSource(stored, steps)
    assert len(set(weights) - set(stored)) > 10
    for name, value in weights.items():
        assert torch.equal(source.tensor(name), value), name


def test_nothing_in_it_is_pickled(folder: Path) -> None:
    check(folder / portable.GRAPH)
    with zipfile.ZipFile(folder / portable.GRAPH) as archive:
        for entry in archive.infolist():
            assert not archive.read(entry).startswith(b"\x80\x02"), entry.filename
    facts = json.loads((folder / portable.FACTS).read_text())
    assert set(facts) == {"weights", "facts", "cache", "layout"}


def test_it_holds_no_path_of_this_machine(folder: Path) -> None:
    with zipfile.ZipFile(folder / portable.GRAPH) as archive:
        content = b"".join(archive.read(entry) for entry in archive.infolist())
    assert str(Path(portable.__file__).resolve().parents[1]).encode() not in content
    assert b"site-packages" not in content


def test_it_holds_no_weights(folder: Path) -> None:
    assert (folder / portable.GRAPH).stat().st_size < 600_000


def rewritten(folder: Path, target: Path, change: Any) -> Path:
    """A copy of the portable folder whose archive went through `change(name, bytes) -> bytes`."""
    shutil.copytree(folder, target)
    with (
        zipfile.ZipFile(folder / portable.GRAPH) as old,
        zipfile.ZipFile(target / portable.GRAPH, "w", zipfile.ZIP_STORED) as new,
    ):
        for entry in old.infolist():
            content = change(entry.filename, old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
        root = old.namelist()[0].split("/")[0]
        extra = change(root, None)
        if extra is not None:
            new.writestr(*extra)
    return target


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def trap(path: Path) -> bytes:
    stream = io.BytesIO()
    torch.save(Trap(path), stream)
    return stream.getvalue()


def test_pickled_sample_inputs_are_refused_before_anything_runs(
    folder: Path, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"

    def change(name: str, content: bytes | None) -> Any:
        if content is None:
            return f"{name}/data/sample_inputs/model.pt", trap(sprung)
        return None if "sample_inputs" in name else content

    bad = rewritten(folder, tmp_path / "bad", change)
    with pytest.raises(SmeltError, match="holds pickled"):
        portable.load_portable(bad)
    assert not sprung.exists()


@pytest.mark.parametrize("kind", ["weights", "constants"])
def test_weights_marked_as_pickled_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    config = {"config": {"w": {"path_name": "w", "is_param": True, "use_pickle": True}}}

    def change(name: str, content: bytes | None) -> Any:
        if content is None:
            return None
        return (
            json.dumps(config).encode() if name.endswith(f"model_{kind}_config.json") else content
        )

    bad = rewritten(folder, tmp_path / "bad", change)
    with zipfile.ZipFile(bad / portable.GRAPH) as archive:
        changed = [n for n in archive.namelist() if n.endswith(f"model_{kind}_config.json")]
    assert changed, f"torch no longer writes model_{kind}_config.json; see runtime/archive.py"
    with pytest.raises(ArchiveError, match="holds pickled weights or constants"):
        portable.load_portable(bad)


def test_an_older_archive_with_pickles_at_its_root_is_refused(folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"

    def change(name: str, content: bytes | None) -> Any:
        return ("serialized_state_dict.pt", trap(sprung)) if content is None else content

    bad = rewritten(folder, tmp_path / "bad", change)
    with pytest.raises(SmeltError, match="pickled"):
        portable.load_portable(bad)
    assert not sprung.exists()


@pytest.mark.parametrize("name", [portable.GRAPH, portable.FACTS])
@pytest.mark.parametrize("damage", ["missing", "truncated", "nonsense"])
def test_damaged_files_are_one_line(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    shutil.copytree(folder, tmp_path / "bad")
    file = tmp_path / "bad" / name
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"[1, 2]")
    with pytest.raises(SmeltError) as caught:
        portable.load_portable(tmp_path / "bad")
    assert "\n" not in str(caught.value)

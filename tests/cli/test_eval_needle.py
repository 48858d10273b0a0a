"""`smelt eval --needle` and `--tasks`: options, output and mistakes, over fake artifacts."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_artifact import fake_artifact
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)

from smelt.cli.app import main


def call(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Standard output of a good call, standard error of a bad one."""
    with pytest.raises(SystemExit) as left:
        main(["eval", *arguments])
    captured = capsys.readouterr()
    assert left.value.code == code, captured.err
    return captured.out if code == 0 else captured.err


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a fake artifact OUT of random weights and a text; the current one."""
    made = fake_artifact(tmp_path / "OUT", max_rows=64)
    monkeypatch.setattr("smelt.runtime.artifact.open_artifact", lambda path: made)
    (tmp_path / "text.txt").write_text(
        "".join(f"It is told that the number {i} came to the king.\n" for i in range(40))
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["passkey", "repeat"])
def test_json_of_a_grid(fake: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    size = ("--needle-lengths", "300,512", "--needle-depths", "0,100", "--needle-trials", "2")
    out = call(capsys, "OUT", "--needle", kind, *size, "--json")
    found = json.loads(out)["needle"]
    assert set(found) == {"found", "tokens", "gain", "cells", "protocol"}
    assert [(c["length"], c["depth"]) for c in found["cells"]] == [
        *((300, 0.0), (300, 1.0), (512, 0.0), (512, 1.0))
    ]
    assert all(0 <= c["found"] <= c["tokens"] <= 1 for c in found["cells"])
    assert kind in found["protocol"]
    again = call(capsys, "OUT", "--needle", kind, *size, "--json", "--needle-seed", "1")
    assert json.loads(again)["needle"]["gain"] != found["gain"]


def test_perplexity_and_needles_in_one_call(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("OUT", "--text", "text.txt", "--needle", "repeat", "--needle-lengths", "400")
    found = json.loads(call(capsys, *arguments, "--json"))
    assert found["perplexity"] > 1 and len(found["needle"]["cells"]) == 5
    lines = call(capsys, *arguments).splitlines()
    assert any(line.startswith("perplexity") for line in lines)
    assert "found, by depth       0 %    25 %    50 %    75 %   100 %" in lines
    assert sum(line.startswith("      400 tokens") for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --text FILE, --needle KIND or --tasks NAME"),
        (["--needle", "hay"], "expected one of passkey, repeat, demo"),
        (["--needle", "passkey", "--needle-lengths", "513"], "2 to 512 tokens"),
        (["--needle", "passkey", "--needle-lengths", "a"], "separated by commas"),
        (["--needle", "passkey", "--needle-depths", "101"], "0 to 100 percent"),
        (["--needle", "passkey", "--needle-trials", "0"], "--needle-trials is 0"),
        (["--needle", "passkey", "--needle-lengths", "50"], "the question alone takes"),
        (["--needle", "demo"], "this model has no <|end|> token"),
        (["--tasks", "demo"], "this model has no <|end|> token"),
        (["--tasks", "demo", "--limit", "0"], "--limit is 0"),
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "demo", "--against", "model"], "give --text FILE"),
        (["--tasks", "own", "--task-path", "nowhere"], "no such folder"),
    ],
)
def test_mistakes_are_one_line(
    fake: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    error = call(capsys, "OUT", *arguments, code=2)
    assert words in error
    assert error.count("\n") == 1


def test_unknown_tasks_name_near_ones(
    fake: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SimpleNamespace(all_tasks=["hellaswag", "winogrande"])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: known)
    error = call(capsys, "OUT", "--tasks", "hellaswga,winogrande", code=2)
    assert "--tasks hellaswga: no such task; is it hellaswag?" in error
    assert "demo is smelt's own" in error


def test_without_the_harness_its_extra_is_named(
    fake: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "smelt.lm_eval", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    error = call(capsys, "OUT", "--tasks", "hellaswag", code=2)
    assert "pip install 'smelt[eval]'" in error and "smelt's own task is demo" in error
    assert error.count("\n") == 1

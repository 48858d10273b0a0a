"""`smelt eval`: over fake artifacts, and on a real checkpoint against transformers' own loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_artifact import FakeArtifact, fake_artifact
from helpers.fake_step import FakeModel, one_thread  # noqa: F401  (autouse fixture)

from smelt.cli.app import main

KEYS = {"tokens", "perplexity", "bits_per_byte", "protocol"}
RUN = Callable[..., str]


def call(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> str:
    """Standard output of a good call, standard error of a bad one."""
    with pytest.raises(SystemExit) as left:
        main(["eval", *arguments])
    captured = capsys.readouterr()
    assert left.value.code == code, captured.err
    return captured.out if code == 0 else captured.err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RUN:
    """Runs `smelt eval OUT`; "other" has other weights, "small" another vocabulary."""
    made: dict[str, FakeArtifact] = {}
    for name in ("OUT", "other", "small"):
        made[name] = fake_artifact(tmp_path / name, max_rows=64)
        (tmp_path / name / "manifest.json").write_text("{}")
    made["other"].program.model = FakeModel(made["OUT"].program.vocab_size, seed=1)
    made["small"].program.vocab_size -= 1
    monkeypatch.setattr("smelt.runtime.artifact.open_artifact", lambda path: made[Path(path).name])
    (tmp_path / "text.txt").write_text("Some words to predict, süß and more.\n" * 4)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        return call(capsys, ["OUT", *arguments], code)

    return run


def test_json(run: RUN) -> None:
    text = ["--text", "text.txt", "--ctx", "32", "--json"]
    alone = json.loads(run(*text))
    assert set(alone) == KEYS
    assert alone["tokens"] == len(Path("text.txt").read_bytes())
    assert alone["bits_per_byte"] == pytest.approx(math.log2(alone["perplexity"]))
    compared = json.loads(run(*text, "--against", "other"))
    assert set(compared) == {*KEYS, "kl", "top1_agreement", "perplexity_original"}
    assert compared["perplexity"] == alone["perplexity"]
    assert compared["kl"] > 0
    same = json.loads(run(*text, "--against", "OUT", "--max-tokens", "50"))
    assert (same["tokens"], same["kl"], same["top1_agreement"]) == (50, 0.0, 1.0)


def test_lines_for_people_name_the_protocol(run: RUN) -> None:
    out = run("--text", "text.txt", "--against", "other")
    assert "perplexity" in out
    assert "top-1 agreement" in out
    assert "protocol: windows of 512 tokens every 255, each begun with BOS" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "absent.txt"], "no file absent.txt"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8"),
        (["--text", "short.txt"], "too few to score"),
        (["--text", "text.txt", "--ctx", "513"], "context of 512"),
        (["--text", "text.txt", "--against", "nothing"], "no folder nothing"),
        (["--text", "text.txt", "--against", "small"], "has 261 tokens and that of small 260"),
        ([], "--text"),
    ],
)
def test_mistakes_are_one_line(run: RUN, arguments: list[str], words: str) -> None:
    Path("latin.txt").write_bytes("schön".encode("latin-1"))
    Path("short.txt").write_text("a")
    error = run(*arguments, code=2)
    assert words in error
    assert error.count("\n") == 1


def eager_loss(model: Any, windows: list[tuple[list[int], int]]) -> float:
    """exp of the mean of transformers' own loss, over the scored tokens of all windows."""
    total, count = 0.0, 0
    for tokens, first in windows:
        labels = torch.tensor([[-100] * first + tokens[first:]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([tokens]), labels=labels).loss
        total += loss.item() * (len(tokens) - first)
        count += len(tokens) - first
    return math.exp(total / count)


def test_perplexity_equals_transformers(
    data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled in fp32, against the model itself; the windows are rebuilt here by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smelt.compiler.api import compile_model

    folder = data("models/stories260K")
    text = data("texts/tinystories_valid.txt").read_text()[:2500]
    file = tmp_path / "text.txt"
    file.write_text(text)
    # Eager runs the same program as the other backends, and compiles in seconds.
    compile_model(folder, tmp_path / "OUT", dtype="fp32", backend="eager")
    size = ["--ctx", "128", "--stride", "100"]
    arguments = [str(tmp_path / "OUT"), "--text", str(file), *size, "--against", str(folder)]
    found = json.loads(call(capsys, [*arguments, "--json"]))

    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    windows = [([1, *ids[:127]], 1)]
    for start in range(100, len(ids), 100):
        windows.append(([1, *ids[start : start + 127]], 28))
        if start + 127 >= len(ids):
            break
    expected = eager_loss(AutoModelForCausalLM.from_pretrained(folder).eval(), windows)
    assert found["tokens"] == len(ids)
    assert found["perplexity"] == pytest.approx(expected, abs=1e-3)
    assert found["perplexity_original"] == pytest.approx(expected, abs=1e-3)
    assert found["kl"] < 1e-6
    assert found["top1_agreement"] > 0.999
    bits = found["tokens"] * math.log2(found["perplexity"])
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-6)

    other = str(data("models/babyllama361"))
    error = call(capsys, [str(tmp_path / "OUT"), "--text", str(file), "--against", other], 2)
    assert "512 tokens" in error
    assert "361" in error

"""`smelt bench` over a fake artifact: the fields, what they follow from, and refused sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_artifact import FakeArtifact, fake_artifact
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)

from smelt.cli.app import main
from smelt.runtime import measure

FIELDS = {
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "ttft_s",
    "load_s",
    "peak_rss_bytes",
    "weight_bytes_per_token",
    "read_bandwidth_bytes_per_s",
    "bound_fraction",
}
WEIGHTS = 12_345
RUN = Callable[..., str]


@pytest.fixture
def artifact(tmp_path: Path) -> FakeArtifact:
    made = fake_artifact(tmp_path / "OUT")
    made.manifest.memory = {"weight_bytes_per_token": WEIGHTS}
    return made


@pytest.fixture
def run(
    artifact: FakeArtifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> RUN:
    monkeypatch.setattr("smelt.runtime.artifact.open_artifact", lambda path: artifact)
    monkeypatch.setattr(measure, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "CACHES_IN_BUFFER", 0)

    def run(*arguments: str, code: int = 0) -> str:
        sizes = {"--prompt": "8", "--gen": "4", "--rounds": "2"}
        given = [x for pair in sizes.items() for x in pair if pair[0] not in arguments]
        with pytest.raises(SystemExit) as left:
            main(["bench", str(artifact.folder), *given, *arguments])
        captured = capsys.readouterr()
        assert left.value.code == code, captured.err
        return captured.out if code == 0 else captured.err

    return run


@pytest.mark.parametrize("batch", [1, 3])
def test_json_has_the_fields_and_they_fit_together(run: RUN, batch: int) -> None:
    found: dict[str, Any] = json.loads(run("--batch", str(batch), "--json"))
    assert set(found) == FIELDS
    assert all(value > 0 for value in found.values())
    assert found["weight_bytes_per_token"] == WEIGHTS
    steps = found["decode_tokens_per_s"] / batch
    bound = WEIGHTS * steps / found["read_bandwidth_bytes_per_s"]
    assert found["bound_fraction"] == pytest.approx(bound)


def test_lines_for_people(run: RUN) -> None:
    assert "of the bound" in run()
    assert "steps/s" in run("--batch", "2")


def test_every_round_runs_whole_and_with_new_prompts(run: RUN, artifact: FakeArtifact) -> None:
    run("--json", "--batch", "2")
    batches = artifact.program.batches
    prompts = [tuple(b.input_ids.tolist()) for b in batches if len(b.input_ids) == 16]
    assert len(prompts) == len(set(prompts)) == 3  # the warm-up and two rounds
    assert sum(len(b.input_ids) == 2 for b in batches) == 3 * 3
    before = [b.input_ids.tolist() for b in batches]
    batches.clear()
    run("--json", "--batch", "2")
    assert [b.input_ids.tolist() for b in batches] == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "0"], "--prompt is 0"),
        (["--gen", "1"], "--gen is 1"),
        (["--batch", "0"], "--batch is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--prompt", "500", "--gen", "20"], "the model's context is 512"),
        (["--batch", "9"], "at most 8 sequences"),
    ],
)
def test_mistakes(run: RUN, arguments: list[str], words: str) -> None:
    assert words in run(*arguments, code=2)


def test_an_artifact_that_does_not_say_its_bytes(run: RUN, artifact: FakeArtifact) -> None:
    artifact.manifest.memory = {}
    assert "compile the model again" in run(code=2)


def test_prefill_longer_than_a_step_and_a_batch_that_starts_in_parts() -> None:
    """Decode tokens before the last prompt is through count in neither rate."""
    from helpers.fake_step import FakeStep

    from smelt.runtime.engine import Engine

    engine = Engine(FakeStep(max_rows=8), kv_cache_tokens=400)
    found = measure.run_round(engine, prompt=24, gen=12, batch=3)
    assert found.prefill_tokens == 72
    assert 0 < found.decode_tokens <= 3 * 11
    assert found.ttft_s <= found.prefill_s
    assert not engine.has_work


def test_a_draft_is_measured_on_text_beside_plain_decoding(run: RUN, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abcabcabcabc\nhello\n")
    found = json.loads(
        run(
            "--draft",
            "ngram",
            "--draft-tokens",
            "3",
            "--text",
            str(prompts),
            "--gen",
            "9",
            "--json",
        )
    )
    assert found["drafter"] == "ngram"
    assert found["same"] is True
    assert found["speed_up"] == pytest.approx(found["tokens_per_s"] / found["plain_tokens_per_s"])
    assert 0 <= found["acceptance"] <= 1 <= found["accepted_length"]
    assert "speed-up" in run("--draft", "ngram", "--rounds", "1", "--gen", "4")
    assert "--text is for --draft" in run("--text", str(prompts), code=2)

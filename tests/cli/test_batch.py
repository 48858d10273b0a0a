"""`smelt generate --input`: every request is answered once, whatever happened before."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_artifact import fake_artifact
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)

from smelt.cli.app import main

RUN = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RUN:
    """Runs `smelt generate OUT --input ... --output ...`; standard output, or the error."""
    artifact = fake_artifact(tmp_path / "OUT")
    module = SimpleNamespace(open_artifact=lambda path: artifact)
    monkeypatch.setitem(sys.modules, "smelt.runtime.artifact", module)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        files = ("--input", "in.jsonl", "--output", "out.jsonl")
        with pytest.raises(SystemExit) as left:
            main(["generate", "OUT", "--kv-cache-tokens", "2000", *files, *arguments])
        captured = capsys.readouterr()
        assert left.value.code == code, captured.err
        return captured.out if code == 0 else captured.err

    return run


def write(*lines: Any) -> None:
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def answers() -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in found}) == len(found)
    return {line["id"]: line for line in found}


def test_each_line_is_answered_by_its_own_parameters(run: RUN) -> None:
    write(
        {"prompt": "one", "max_tokens": 3, "ignore_eos": True},
        {"id": "talk", "messages": [{"role": "user", "content": "hi"}]},
        {"id": "ids", "token_ids": [1, 2, 3], "n": 2, "temperature": 1.0, "logprobs": 1},
        {"id": "long", "prompt": "x" * 9000},
    )
    summary = json.loads(run("-n", "6", "--json"))
    found = answers()
    assert found.keys() == {"1", "talk", "ids", "long"}
    assert found["1"]["generated_tokens"] == 3
    assert len(found["ids"]["texts"]) == 2
    assert found["ids"]["logprobs"][0]["rank"] >= 1
    assert "shorten the prompt" in found["long"]["error"]
    assert (summary["answered"], summary["failed"], summary["skipped"]) == (4, 1, 0)
    assert summary["tokens_per_s"] > 0 and summary["ttft_s_p50"] > 0


def test_a_run_goes_on_where_it_was_killed(run: RUN) -> None:
    write(*({"id": i, "prompt": f"prompt {i}"} for i in range(8)))
    run("-n", "5")
    whole = answers()
    text = Path("out.jsonl").read_text().splitlines(keepends=True)
    # Five answers are there and half of a sixth; one line of them says that it failed.
    failed = json.dumps({"id": "0", "text": "", "error": "kernel failed"}) + "\n"
    kept = [line for line in text if json.loads(line)["id"] != "0"][:4]
    Path("out.jsonl").write_text("".join([*kept, failed, text[-1][:20]]))
    assert "4 answers in" in run("-n", "5")
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert sum(line["id"] == "0" for line in found) == 2
    assert {line["id"]: line["text"] for line in found} == {k: v["text"] for k, v in whole.items()}
    assert "0 answers in" in run("-n", "5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no request"),
        ("{'prompt': 1}\n", "line 1 is no JSON"),
        ('["a"]\n', "line 1: write a JSON object"),
        ('{"prompt": "a"}\n{"text": "a"}\n', "line 2: give exactly one of prompt"),
        ('{"prompt": "a", "messages": []}\n', "exactly one of prompt"),
        ('{"prompt": "a", "temprature": 1}\n', "'temprature' is no parameter"),
        ('{"prompt": "a", "top_p": 7}\n', "line 1: top_p is 7"),
        (
            '{"id": 1, "prompt": "a"}\n{"prompt": "a"}\n{"id": "1", "prompt": "b"}\n',
            "line 3: id '1'",
        ),
        ("\xff\n", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(run: RUN, content: str, message: str) -> None:
    Path("in.jsonl").write_text(content, encoding="latin-1")
    assert message in run(code=2)
    assert not Path("out.jsonl").exists()


def test_an_output_that_is_something_else_is_left_alone(run: RUN) -> None:
    write({"prompt": "a"})
    Path("out.jsonl").write_text('{"name": "mine"}\n')
    assert "no answer of an earlier run" in run(code=2)
    assert Path("out.jsonl").read_text() == '{"name": "mine"}\n'
    assert "write to another file" in run("--output", "in.jsonl", code=2)

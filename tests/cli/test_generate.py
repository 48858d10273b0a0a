"""`smelt generate` over a fake artifact: streams, batches, JSON, files and stdin."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.fake_artifact import fake_artifact
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)

from smelt.cli.app import main

CACHE = ["--kv-cache-tokens", "2000"]
RUN = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RUN:
    """Runs `smelt generate OUT ...` and returns its standard output."""
    artifact = fake_artifact(tmp_path / "OUT")
    module = SimpleNamespace(open_artifact=lambda path: artifact)
    monkeypatch.setitem(sys.modules, "smelt.runtime.artifact", module)

    def run(*arguments: str, stdin: str = "", code: int = 0) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            main(["generate", str(artifact.folder), *CACHE, *arguments])
        captured = capsys.readouterr()
        assert left.value.code == code, captured.err
        return captured.out if code == 0 else captured.err

    return run


def test_json_is_one_object_and_equals_the_stream(run: RUN) -> None:
    data = json.loads(run("Hello", "-n", "9", "--json"))
    (output,) = data["outputs"]
    assert set(output) == {
        "text",
        "token_ids",
        "prompt_tokens",
        "reused_tokens",
        "finish_reason",
        "ttft_s",
        "decode_tokens_per_s",
    }
    assert len(output["token_ids"]) <= 9
    assert run("Hello", "-n", "9") == output["text"] + "\n"


def test_several_prompts_from_arguments_file_and_stdin(run: RUN, tmp_path: Path) -> None:
    given = run("one", "two", "-n", "4")
    assert given.startswith(">>> one\n")
    assert "\n>>> two\n" in given
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert run("--file", str(file), "-n", "4") == given
    assert run("-n", "4", stdin="one\ntwo\n") == given
    assert run("-", "-n", "4", stdin="one\ntwo\n") == given


def test_sampling_options_reach_the_sampler(run: RUN) -> None:
    base = ["Hello", "-n", "20", "--ignore-eos"]
    greedy = run(*base)
    hot = [*base, "--temperature", "1.5"]
    assert run(*hot) == run(*hot, "--seed", "0") != greedy
    assert run(*hot, "--seed", "1") != run(*hot)
    for tight in (["--top-k", "1"], ["--top-p", "0.000001"], ["--min-p", "1"]):
        assert run(*hot, *tight) == greedy
    assert run(*base, "--repetition-penalty", "3") != greedy
    assert run(*base, "--stop", greedy[3:5]) == greedy[:3] + "\n"


def test_generating_imports_no_compiler(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as left: assert left.code == 0, left.code\n"
        "heavy = ('transformers', 'torch._inductor', 'torch._dynamo', 'rich', 'jinja2',\n"
        "         'prompt_toolkit', 'smelt.compiler', 'smelt.passes', 'smelt.models')\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    fake = Path(__file__).resolve().parents[1] / "helpers" / "fake_cli.py"
    arguments = [str(tmp_path / "OUT"), "template", "generate", str(tmp_path / "OUT"), "Hi"]
    program = f"import sys; sys.argv = {[str(fake), *arguments, *CACHE]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n[]\n"), done.stdout[-500:]


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        ([], "", "stdin holds no prompt"),
        (["x" * 600], "", "601 tokens"),
        (["x", "--kv-cache-tokens", "0"], "", "--kv-cache-tokens is 0"),
        (["x", "--kv-cache-fraction", "2"], "", "--kv-cache-fraction is 2"),
    ],
)
def test_mistakes(run: RUN, arguments: list[str], stdin: str, words: str) -> None:
    if "--kv-cache-fraction" in arguments:
        CACHE.clear()
    try:
        assert words in run(*arguments, stdin=stdin, code=2)
    finally:
        CACHE[:] = ["--kv-cache-tokens", "2000"]


def test_several_answers_and_their_log_probabilities(run: RUN) -> None:
    text = run("Hello", "-n", "4", "--n", "2", "--temperature", "1", "--logprobs", "2")
    assert text.startswith(">>> Hello\n")
    assert text.count("rank") == 8
    (output,) = json.loads(run("Hello", "-n", "4", "--n", "3", "--temperature", "1", "--json"))[
        "outputs"
    ]
    assert len(output["texts"]) == 3


def test_drafting_and_determinism_change_no_token(run: RUN) -> None:
    plain = run("abcabcabcabc", "-n", "20", "--ignore-eos")
    for flags in (["--draft", "ngram"], ["--draft", "ngram", "--draft-tokens", "4"]):
        assert run("abcabcabcabc", "-n", "20", "--ignore-eos", *flags) == plain
    assert run("abcabcabcabc", "-n", "20", "--ignore-eos", "--deterministic") == plain
    assert "no folder" in run("a", "--draft", "nowhere", code=2)
    assert "--draft-tokens" in run("a", "--draft", "ngram", "--draft-tokens", "many", code=2)


def test_structures_are_kept_and_read_from_files(run: RUN, tmp_path: Path) -> None:
    assert run("a", "--choice", "yes", "--choice", "no").strip() in ("yes", "no")
    assert run("a", "--regex", "[0-9]{3}").strip().isdigit()
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}')
    value = json.loads(run("a", "--json-schema", str(schema), "-n", "60"))
    assert isinstance(value, list)
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "x" [yz]')
    assert run("a", "--grammar", str(grammar)).strip() in ("xy", "xz")
    assert "exactly one" in run("a", "--regex", "a", "--choice", "b", code=2)
    assert "cannot be read" in run("a", "--json-schema", "nowhere.json", code=2)

"""lm-evaluation-harness on an artifact gives what its own transformers model gives.

Offline: the tasks are local files. The oracle is the harness's `HFLM` over the checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.artifacts import DEMO
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from smelt.cli.app import main
from smelt.lm_eval import SmeltLM
from smelt.models.demo.data import read_heldout, render
from smelt.runtime.errors import UserError

CHOICE = """
task: odd_one_out
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """
task: sums
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["=", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TEXT = """
task: chats
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""


@pytest.fixture(scope="module")
def ours(fp32: Path) -> SmeltLM:
    return SmeltLM(fp32)


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    lm = HFLM(pretrained=str(DEMO), device="cpu", dtype="float32", batch_size=4)
    # The checkpoint's own limit would win over that of the task.
    lm.model.generation_config.max_new_tokens = None
    return lm


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three task files and their data."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    held = read_heldout()
    odd, sums = held["odd_one"][:8], held["add_two_digits"][:6]
    rows: dict[str, list[dict[str, Any]]] = {"choice": [], "answer": [], "text": []}
    for sample in odd:
        question = sample.messages[0]["content"]
        choices = question.split(": ")[1].strip("?").split(", ")
        label = choices.index(sample.answer)
        rows["choice"].append({"question": question, "choices": choices, "label": label})
    for sample in sums:
        rows["answer"].append({"question": sample.messages[0]["content"], "answer": sample.answer})
    lines = (DEMO.parent / "heldout.txt").read_text().splitlines()
    rows["text"] = [{"text": "\n".join(lines[:20])}, {"text": lines[30]}]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("text", TEXT)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{text}{source}test_split: test\n")
    return folder


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def question(text: str) -> str:
    return render([{"role": "user", "content": text}], add_generation_prompt=True)


def test_likelihoods(ours: SmeltLM, theirs: HFLM) -> None:
    """Answers of one token and of several; no context, BOS written out, long contexts cut."""
    long = "\n".join((DEMO.parent / "heldout.txt").read_text().splitlines()[:25])
    pairs = [
        *((question("What is 3 + 4?"), answer) for answer in ("7", "8", "7<|end|>", "seventeen")),
        ("", "Once upon a time"),
        ("Spell cat. ", "c-a-t"),
        (long, " and so on"),
        (long, "!"),
    ]
    assert len(ours.tok_encode(long)) > ours.max_length == theirs.max_length
    found = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=2e-3)


def test_rolling_likelihoods(ours: SmeltLM, theirs: HFLM) -> None:
    lines = (DEMO.parent / "heldout.txt").read_text().splitlines()
    texts = [("\n".join(lines[:40]),), (lines[0],), ("plain words without BOS",)]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), True)
    assert found == pytest.approx(expected, rel=1e-4)


def test_generation(ours: SmeltLM, theirs: HFLM) -> None:
    """Stop strings, limits, the end token, and a context that leaves no room."""
    spell, count = question("Spell rabbit."), question("Count from 1 to 9.")
    long = "\n".join((DEMO.parent / "heldout.txt").read_text().splitlines()[:25]) + spell
    asked = [
        (spell, {"until": ["-b"]}),
        (spell, {"until": []}),
        (count, {"until": [", 5"], "max_gen_toks": 30, "do_sample": False, "temperature": 0.0}),
        (count, {"until": ["none"], "max_new_tokens": 4}),
        (long, {"until": "\n", "max_gen_toks": 16}),
        ("The", {"until": ["."], "max_gen_toks": 8}),
    ]
    found = ours.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert found == theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert found[0] == "r-a"
    assert found[2].endswith("4")


def test_sampling_is_repeatable_and_differs_between_repeats(ours: SmeltLM) -> None:
    asked = [("The", {"do_sample": True, "max_gen_toks": 12, "top_p": 0.9})] * 4
    found = ours.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert found == ours.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert len(set(found)) > 1


def test_tasks_of_the_harness(
    fp32: Path, theirs: HFLM, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way, by the command line, with the chat template; examples before the question."""
    names = "odd_one_out,sums,chats"
    command = ["eval", str(fp32), "--tasks", names, "--task-path", str(tasks)]
    with pytest.raises(SystemExit) as left:
        main([*command, "--chat-template", "--num-fewshot", "2", "--limit", "6", "--json"])
    captured = capsys.readouterr()
    assert left.value.code == 0, captured.err
    found = json.loads(captured.out)["tasks"]
    expected = simple_evaluate(
        model=theirs,
        tasks=names.split(","),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        num_fewshot=2,
        limit=6,
        bootstrap_iters=1000,
    )["results"]
    assert set(found) == set(names.split(","))
    for task, metrics in found.items():
        assert metrics, task
        for name, value in metrics.items():
            assert value == pytest.approx(expected[task][f"{name},none"], rel=1e-3), (task, name)
    assert found["sums"]["exact_match"] > 0.5
    assert found["odd_one_out"]["acc"] > 0.3
    assert found["chats"]["byte_perplexity"] < 2


def test_the_command_line_of_the_harness(fp32: Path, tasks: Path) -> None:
    """`python -m smelt.lm_eval` is the harness's, with our model known to it."""
    command = [sys.executable, "-m", "smelt.lm_eval", "run", "--model", "smelt", "--limit", "2"]
    command += ["--model_args", f"path={fp32}", "--tasks", "sums", "--include_path", str(tasks)]
    cache = {"HF_DATASETS_CACHE": str(tasks / "cache")}
    done = subprocess.run(
        [*command, "--apply_chat_template", "--output_path", str(tasks / "out")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **cache},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tasks / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["results"]["sums"]["exact_match,none"] == 1.0


def test_the_harness_finds_the_model_by_name(fp32: Path) -> None:
    lm = get_model("smelt").create_from_arg_string(
        f"path={fp32},max_length=64,add_bos_token=False", {"batch_size": 8, "device": "cuda:0"}
    )
    assert (lm.max_length, lm.batch_size, lm.tok_encode("a")) == (64, 8, lm.tok_encode("a", False))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda lm: SmeltLM(lm.llm, max_length=513), "at most 512"),
        (lambda lm: lm.chat_template("tools"), "an artifact has one"),
        (lambda lm: lm._params({"num_beams": 4}, [], 0), "num_beams"),
        (lambda lm: lm._params({"max_gen_toks": 512}, [], 0), "context is 512"),
        (lambda lm: lm._loglikelihood_tokens([(None, [1], [2] * 513)]), "513 tokens"),
    ],
)
def test_mistakes_are_told(ours: SmeltLM, act: Callable[[SmeltLM], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        act(ours)


def test_an_open_answer_keeps_its_turn_open(ours: SmeltLM, theirs: HFLM) -> None:
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello, I am"}]
    for messages, ask in ((chat[:1], True), (chat, False)):
        found = ours.apply_chat_template(messages, add_generation_prompt=ask)
        assert found == theirs.apply_chat_template(messages, add_generation_prompt=ask)

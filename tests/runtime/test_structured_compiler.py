"""Hostile descriptions fail alone and in one line; grammars are kept; choices and EBNF hold."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.data import data_path
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from helpers.grammars import (
    BACKENDS,
    DEMO,
    DEMO_END,
    DEMO_SIZE,
    answers,
    demo_answers,
)

from smelt.runtime import structured_compiler
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.structured import Structured
from smelt.runtime.structured_compiler import GrammarCompiler
from smelt.runtime.tokenizer import Tokenizer


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


WIDE = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(3000)}}
HOSTILE: list[dict[str, Any]] = [
    {"regex": "(((a{1,1000}){1,1000}){1,1000})"},
    {"regex": "a{1,1000000000}"},
    {"regex": "(a+)+$"},
    {"regex": ".*" * 2000},
    {"regex": "(" * 60 + "a" + "){1,9}" * 60},
    {"regex": "("},
    {"regex": "[" * 60},
    {"regex": "\ud800"},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}}}},
    {"json_schema": nested(20)},
    {"json_schema": {"enum": [f"value {i}" for i in range(50_000)]}},
    {"json_schema": WIDE},
    {"json_schema": {"type": "string", "pattern": "^(((a{1,1000}){1,1000}){1,1000})$"}},
    {"json_schema": {"type": "array", "minItems": 10**9}},
    {"json_schema": {"type": "string", "maxLength": 10**8}},
    {"json_schema": {"type": "integer", "minimum": 10**400}},
    {"json_schema": {"enum": []}},
    {"json_schema": False},
    {"json_schema": {"not": {}}},
    {"json_schema": {"type": "foo"}},
    {"grammar": "garbage"},
    {"grammar": "root ::= root"},
    {"grammar": "root ::= missing"},
    {"grammar": 'root ::= "a"{1,1000000000}'},
    {"grammar": 'root ::= root root | "a" | ""'},
    {"grammar": "root ::= " + " ".join(["a"] * 50) + '\na ::= a a | "x" | ""'},
    {"choice": [f"option {i} " + "x" * 90 for i in range(10_000)]},
]
REFUSED = (
    "(",
    "[",
    "garbage",
    "root ::= root",
    "root ::= missing",
    "foo",
    '"not": {}',
    '"enum": []',
)


@pytest.fixture(scope="module")
def impatient() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [DEMO_END], seconds=2.0)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_descriptions_fail_in_one_line_or_work(
    impatient: GrammarCompiler, backend: str
) -> None:
    pytest.importorskip(backend)
    tokenizer = Tokenizer(DEMO)
    refused = set()
    for fields in HOSTILE:
        try:
            spec = Structured(**fields, backend=backend)
            grammar = impatient.compile(spec)
        except UserError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 600
            refused.add(json.dumps(fields)[:80])
            continue
        # A library's own limits may end a request later, and only that request.
        with contextlib.suppress(SmeltError):
            answers(grammar, tokenizer, DEMO_SIZE, [DEMO_END], count=1, most=4)
    for fields in HOSTILE:
        ((_, value),) = fields.items()
        text = value if isinstance(value, str) else json.dumps(value)
        if text in REFUSED or value is False:
            assert json.dumps(fields)[:80] in refused, fields
    assert len(refused) < len(HOSTILE) - 5
    # and afterwards all is well
    grammar = impatient.compile(Structured(choice=["fine"], backend=backend))
    assert answers(grammar, tokenizer, DEMO_SIZE, [DEMO_END], count=1) == ["fine"]


def test_what_takes_too_long_is_stopped(impatient: GrammarCompiler) -> None:
    """xgrammar takes minutes for this list, and cannot be interrupted within the process."""
    pytest.importorskip("xgrammar")
    schema = {"enum": [f"value {i}" for i in range(50_000)]}
    with pytest.raises(UserError, match="longer than 2 s"):
        impatient.compile(Structured(json_schema=schema, backend="xgrammar"))
    choice = Structured(choice=["a", "b"], backend="xgrammar")
    assert impatient.compile(choice) is impatient.compile(choice)


def test_auto_takes_the_library_that_can(impatient: GrammarCompiler) -> None:
    pytest.importorskip("llguidance")
    only_one = Structured(json_schema={"type": "integer", "multipleOf": 5})
    grammar = impatient.compile(only_one)
    texts = answers(grammar, Tokenizer(DEMO), DEMO_SIZE, [DEMO_END])
    assert all(text is not None and int(text) % 5 == 0 for text in texts)
    with pytest.raises(UserError, match=r"xgrammar: .*uniqueItems.*; llguidance: .*uniqueItems"):
        impatient.compile(Structured(json_schema={"type": "array", "uniqueItems": True}))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [DEMO_END])
    monkeypatch.setitem(sys.modules, "smelt.runtime.structured_llguidance", None)
    with pytest.raises(UserError, match=r"not installed.*pip install llguidance"):
        compiler.compile(Structured(regex="a", backend="llguidance"))
    compiler.close()


def test_a_model_without_end_tokens_is_refused() -> None:
    compiler = GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [])
    with pytest.raises(UserError, match="no end token"):
        compiler.compile(Structured(regex="a"))
    compiler.close()


def test_the_least_recently_used_grammar_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(
        GrammarCompiler, "_compile", lambda self, spec: compiled.append(spec.text) or object()
    )
    compiler = GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [DEMO_END], cached=2)
    for regex in ("a", "b", "a", "c", "a", "b"):
        compiler.compile(Structured(regex=regex))
    assert compiled == ["a", "b", "c", "b"]
    compiler.close()


def test_a_failure_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(self: GrammarCompiler, spec: Structured) -> None:
        tried.append(spec.text)
        raise UserError("no")

    monkeypatch.setattr(GrammarCompiler, "_compile", fail)
    compiler = GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [DEMO_END])
    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            compiler.compile(Structured(regex="a"))
    assert tried == ["a"]
    compiler.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_ends_the_processes_and_grammars_stay(backend: str) -> None:
    pytest.importorskip(backend)
    compiler = GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [DEMO_END])
    grammar = compiler.compile(Structured(choice=["one"], backend=backend))
    (worker,) = compiler._idle[backend]
    compiler.close()
    assert not worker.alive
    assert answers(grammar, Tokenizer(DEMO), DEMO_SIZE, [DEMO_END], count=1) == ["one"]


def test_a_process_that_ended_meanwhile_is_replaced() -> None:
    pytest.importorskip("llguidance")
    compiler = GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [DEMO_END])
    compiler.compile(Structured(choice=["one"], backend="llguidance"))
    (worker,) = compiler._idle["llguidance"]
    worker.end()
    compiler.compile(Structured(choice=["two"], backend="llguidance"))
    compiler.close()


CHOICES = [
    "yes",
    "no",
    "no way",
    'a "quoted" one',
    "back\\slash",
    "línea\nzwei 日本 😀",
    "root ::=",
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_choices(backend: str) -> None:
    pytest.importorskip(backend)
    texts = demo_answers(Structured(choice=CHOICES, backend=backend), count=40)
    assert set(texts) <= set(CHOICES)
    assert len(set(texts)) > 3
    for choice in CHOICES:  # each of them alone, so that every spelling is written once
        assert demo_answers(Structured(choice=[choice], backend=backend), count=1) == [choice]


SUMS = """
# sums of numbers and brackets
root ::= term (" + " term)*
term ::= [0-9] [0-9]? | "(" root ")" | "-" term
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_follow_a_grammar(backend: str) -> None:
    pytest.importorskip(backend)
    texts = demo_answers(Structured(grammar=SUMS, backend=backend), count=30)
    complete = [text for text in texts if text is not None]
    assert len(complete) > 20
    for text in complete:
        assert set(text) <= set("0123456789 +-()")
        assert isinstance(eval(text.replace("0", "1")), int)  # leading zeros are no Python
    assert len(set(complete)) > 10


@pytest.mark.parametrize("name", ["gpt2", "mistral_v1"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_vocabularies(name: str, backend: str) -> None:
    """Byte-level BPE of 50,257 tokens, and SentencePiece with byte fallback."""
    pytest.importorskip(backend)
    tokenizer = Tokenizer(data_path(f"tokenizers/{name}"))
    size, end = {"gpt2": (50304, 50256), "mistral_v1": (32000, 2)}[name]
    compiler = GrammarCompiler(tokenizer, size, [end])
    choice = compiler.compile(Structured(choice=CHOICES, backend=backend))
    assert set(answers(choice, tokenizer, size, [end], count=4)) <= set(CHOICES)
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "integer", "minimum": -3}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    grammar = compiler.compile(Structured(json_schema=schema, backend=backend))
    for text in answers(grammar, tokenizer, size, [end], count=4):
        assert text is not None
        value = json.loads(text)
        assert set(value) == {"name", "n"}
        assert isinstance(value["name"], str)
        assert value["n"] >= -3
    compiler.close()


def test_a_worker_that_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(structured_compiler.sys, "executable", "/bin/false")
    compiler = GrammarCompiler(Tokenizer(DEMO), DEMO_SIZE, [DEMO_END])
    spec = Structured(choice=["a"], backend="llguidance")
    with pytest.raises(SmeltError, match=r"did not start \(exit code 1\)"):
        compiler.compile(spec)
    monkeypatch.undo()
    compiler.compile(spec)  # it was no fault of the description
    compiler.close()


def test_nothing_is_imported_before_a_request_asks() -> None:
    code = (
        "import sys, smelt.runtime.engine, smelt.runtime.structured_compiler as c\n"
        "from smelt.runtime.tokenizer import Tokenizer\n"
        "from smelt.runtime.sampling_params import SamplingParams\n"
        "from smelt.runtime.structured import Structured\n"
        f"c.GrammarCompiler(Tokenizer({str(DEMO)!r}), 1024, [4])\n"
        "SamplingParams(structured=Structured(json_object=True))\n"
        "print([m for m in ('xgrammar', 'llguidance', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "[]"


def test_processes_do_not_outlive_their_parent(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    code = (
        "import os\n"
        "from smelt.runtime.structured_compiler import GrammarCompiler\n"
        "from smelt.runtime.tokenizer import Tokenizer\n"
        "from smelt.runtime.structured import Structured\n"
        f"c = GrammarCompiler(Tokenizer({str(DEMO)!r}), 1024, [4])\n"
        "c.compile(Structured(choice=['a'], backend='llguidance'))\n"
        "print(c._idle['llguidance'][0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    process = Path("/proc") / done.stdout.strip()
    for _ in range(100):
        if not process.exists() or "\nState:\tZ" in (process / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"{process} still runs")

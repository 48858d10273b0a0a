"""The documents say what is there: flags exist, links resolve, generated pages are current."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.check_pass import check_pass
from helpers.tiny import after, tiny_program

from smelt.cli.app import VERBS, _load
from smelt.passes.base import Pass
from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.canonical.rms_norm import CanonicalizeRmsNorm

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    if path.is_file()
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(text: str) -> Iterator[str]:
    """Every `smelt ...` command line of a page: lines of code blocks, and code within a line."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    yield from re.findall(r"`(smelt [^`\n]+)`", FENCE.sub("", text))
    code = [line for block in FENCE.findall(text) for line in block.splitlines()]
    code += re.findall(r"^(?: {4}|\t).*$", FENCE.sub("", text), re.MULTILINE)
    for line in code:
        found = re.match(r"\s*(?:[$>] )?(smelt [a-z-].*)", line)
        if found and (found.group(1).split()[1] in VERBS or " -" in line):
            yield found.group(1)


def words(command: str) -> list[str]:
    """The words up to a comment, a pipe or an explanation set apart by two spaces."""
    command = (
        re.split(r"\s{2,}(?!-)|\s#|\s\||\s>|;", command)[0].replace("[", " ").replace("]", " ")
    )
    return shlex.split(command.replace("...", ""), posix=True)


def flags(verb: str) -> set[str]:
    found = {"--help", "-h", "--debug"}
    for parameter in _load(verb).params:
        found.update(parameter.opts)
        found.update(parameter.secondary_opts)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_line_has_flags_that_exist(page: Path) -> None:
    wrong = []
    for command in commands(page.read_text(encoding="utf-8")):
        _, *rest = words(command)
        if not rest or rest[0].startswith("-") or rest[0].isupper():
            continue  # `smelt --help`, `smelt VERB`
        if rest[0] not in VERBS:
            wrong.append(f"{command}: no verb {rest[0]}")
            continue
        given = {w.split("=")[0] for w in rest[1:] if re.match(r"--?[a-z]", w)}
        wrong += [f"{command}: no flag {flag}" for flag in sorted(given - flags(rest[0]))]
    assert wrong == []


def test_the_reader_of_command_lines_reads_them() -> None:
    text = (
        "    smelt compile M -o OUT \\\n        --quant awq   # int4\nsee `smelt bench OUT --json`"
    )
    assert [words(c) for c in commands(text)] == [
        ["smelt", "bench", "OUT", "--json"],
        ["smelt", "compile", "M", "-o", "OUT", "--quant", "awq"],
    ]
    assert {"--quant", "-o"} <= flags("compile") and "--quantt" not in flags("compile")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_resolve(page: Path) -> None:
    wrong = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(path):
            wrong.append(f"{target}: no such heading")
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_page_of_passes_is_current() -> None:
    expected = script("passes_page").page()
    found = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert found == expected, "docs/passes.md is old: run python scripts/passes_page.py"


def test_every_pass_shows_before_and_after() -> None:
    for name, (pass_, _) in script("passes_page").all_passes().items():
        text = type(pass_).__doc__ or ""
        assert "Before" in text and "After" in text, name


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pass that CONTRIBUTING.md shows, loaded as `--pass FILE.py:Class` loads it."""
    from smelt.compiler.pipeline import load_pass

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    code = found.group(1)
    assert len(code.splitlines()) < 40
    (name,) = [n.name for n in ast.parse(code).body if isinstance(n, ast.ClassDef)]
    path = tmp_path_factory.mktemp("contributing") / "example.py"
    path.write_text(code)
    return load_pass(f"{path}:{name}")


def test_the_example_pass_fires_on_a_llama(example: Pass) -> None:
    subject = after(tiny_program("llama"), RemoveNoops(), CanonicalizeRmsNorm())
    check_pass(
        subject,
        example,
        before={"smelt.rms_norm": 5, "aten.linear": 15},
        after={"smelt.rms_norm": 5, "aten.linear": 15},
        matched=5,
        rewritten=5,
    )


def test_the_example_pass_declines_an_offset(example: Pass) -> None:
    subject = after(tiny_program("gemma2"), RemoveNoops(), CanonicalizeRmsNorm())
    norms = subject.program.facts.module_counts["rms_norm"]
    check_pass(
        subject,
        example,
        before={"smelt.rms_norm": norms},
        after={"smelt.rms_norm": norms},
        rewritten=0,
        declined=["an offset"] * norms,
    )


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text

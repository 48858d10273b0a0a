"""The command line itself: help without imports, one line and the right code for each error."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys

import pytest

from smelt.cli import app, generate
from smelt.runtime.errors import SmeltError, UserError


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        app.main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from smelt.cli.app import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'jinja2', 'prompt_toolkit'}\n"
        "sys.exit(1 if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb, (_, line) in app.VERBS.items():
        assert verb in done.stdout
        assert line in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("smelt 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["generate"],
        ["generate", "OUT", "x", "--nonsense"],
        ["generate", "OUT", "x", "-n", "many"],
        ["generate", "OUT", "x", "--top-p", "3"],
        ["generate", "OUT", "x", "--temperature", "-1"],
        ["generate", "OUT", "x", "--file", "also"],
        ["generate", "OUT", "--file", "/does/not/exist"],
        ["chat", "OUT", "-n", "0"],
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("smelt: ")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("your mistake"), 2, "your mistake"),
        (SmeltError("a failure\nin two lines"), 1, "a failure in two lines"),
        (OSError(errno.ENOSPC, "No space left", "/out"), 1, "disk is full (/out)"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 1, "denied: /out"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("odd"), 1, "RuntimeError: odd (--debug"),
    ],
)
def test_errors_of_a_verb(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(generate, "command", broken)
    assert run("generate") == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    for arguments in (["--debug", "generate"], ["generate", "--debug"]):
        with pytest.raises((type(error), SystemExit)) as left:
            app.main(arguments)
        assert left.type is type(error) or isinstance(error, KeyboardInterrupt)


def test_a_verb_that_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(app.VERBS, "doctor", ("no_such_file", "x"))
    assert run("doctor") == 1
    assert "not part of this installation" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "from smelt.cli.app import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert b"Traceback" not in done.stderr


def test_libraries_do_not_chatter_between_our_lines() -> None:
    assert run("--version") == 0
    assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in app.CHATTY)

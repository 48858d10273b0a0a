"""`smelt chat`: through pipes, and on a real (pseudo) terminal with Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smelt.cli.console import MarkdownText

FAKE = Path(__file__).resolve().parents[1] / "helpers" / "fake_cli.py"
CACHE = ["--kv-cache-tokens", "2000"]


def command(folder: Path, *arguments: str, template: str = "template") -> list[str]:
    fake = [sys.executable, str(FAKE), str(folder / "OUT"), template]
    return [*fake, "chat", str(folder / "OUT"), *CACHE, *arguments]


def piped(folder: Path, text: str, *arguments: str, template: str = "template") -> tuple[str, str]:
    done = subprocess.run(
        command(folder, *arguments, template=template),
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_whole_conversation_through_pipes(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    text = "\n".join(
        [
            "Hello",
            "",
            "How are you?",
            "/stats",
            f"/save {saved}",
            "/system Be brief.",
            "/reset",
            f"/load {saved}",
            "/nonsense",
            "/load",
            "/load /no/such/file",
            "/help",
            "/exit",
            "never read",
        ]
    )
    out, err = piped(tmp_path, text, "-n", "6", "--system", "You are a test.")
    lines = out.splitlines()
    assert "turns: 2" in lines
    reused = re.search(r"reused from the cache: (\d+)", out)
    assert reused
    assert int(reused.group(1)) > 20
    assert f"4 messages written to {saved}" in lines
    assert f"4 messages read from {saved}" in lines
    assert "conversation forgotten" in lines
    assert any(line.startswith("/reset") for line in lines)
    assert err.splitlines() == [
        "smelt: /nonsense is no command: /help lists them",
        "smelt: /load needs a file name, as in /load talk.json",
        *[line for line in err.splitlines() if "/no/such/file" in line],
    ]


def test_a_full_context_is_said(tmp_path: Path) -> None:
    text = "\n".join(f"{number} " + "word " * 30 for number in range(4))
    _, err = piped(tmp_path, text, "-n", "4")
    assert "the context is full" in err
    assert "Traceback" not in err
    _, err = piped(tmp_path, "word " * 200, "-n", "4")
    assert "this message alone" in err


def test_without_a_template(tmp_path: Path) -> None:
    out, err = piped(tmp_path, "Once upon a time\n", "-n", "5", template="none")
    assert "no chat template" in err
    assert out.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    import pty

    main, side = pty.openpty()
    environment = {**os.environ, "SLOW": "1", "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        command(tmp_path), stdin=side, stdout=side, stderr=side, env=environment, close_fds=True
    )
    os.close(side)
    try:
        seen = wait_for(main, r">")
        os.write(main, b"Hello\r")
        seen = wait_for(main, r"[a-z]{2}[a-z ,.]{8}")
        process.send_signal(signal.SIGINT)
        seen += wait_for(main, r"\(stopped\)")
        os.write(main, b"/stats\r")
        seen += wait_for(main, r"turns: 1")
        os.write(main, b"/exit\r")
        drain(main, process)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
    history = (tmp_path / "smelt" / "chat_history").read_text()
    assert "Hello" in history


def wait_for(terminal: int, pattern: str, seconds: float = 40) -> str:
    """Read from the terminal until the pattern shows; answers its cursor queries."""
    seen, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        seen += read(terminal)
        if re.search(pattern, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)):
            return seen
    raise AssertionError(f"{pattern!r} did not show in {seen[-2000:]!r}")


def read(terminal: int) -> str:
    import select

    if not select.select([terminal], [], [], 0.1)[0]:
        return ""
    try:
        text = os.read(terminal, 65536).decode("utf-8", "replace")
    except OSError:  # the other side has closed
        return ""
    if "\x1b[6n" in text:
        os.write(terminal, b"\x1b[1;1R")
    return text


def drain(terminal: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        read(terminal)
        if process.poll() is not None:
            return


def test_markdown_is_finished_at_blank_lines_outside_fences() -> None:
    text = MarkdownText()
    pieces = ["# Head", "\n\nSome *te", "xt*\n", "\n```py\na\n\nb\n", "```\n\nend"]
    finished = [text.add(piece) for piece in pieces]
    assert finished == ["", "# Head\n\n", "", "Some *text*\n\n", "```py\na\n\nb\n```\n\n"]
    assert text.rest == "end"

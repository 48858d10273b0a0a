"""Where a chat's lines come from and where its answers go: a terminal, or plain pipes.

On a terminal, lines are edited with a history and answers are rendered as Markdown while they
arrive. Piped, each line of stdin is a message and each answer is plain text on stdout.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from rich.markdown import Markdown

    from smelt.runtime.chat_session import Turn


class Console(Protocol):
    """What the chat loop needs."""

    def read(self) -> str | None:
        """The next line; None at the end of input (Ctrl-D)."""

    def answer(self, turn: Turn) -> None:
        """Print a turn's pieces as they come; Ctrl-C ends the answer."""

    def say(self, text: str) -> None:
        """What a command has to say."""

    def notice(self, text: str) -> None:
        """Something besides the conversation: a warning, an error."""


def open_console(commands: Iterable[str]) -> Console:
    """A terminal console where both ends are one, otherwise the plain one."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TerminalConsole(commands)
    return PlainConsole()


@contextmanager
def cancelling(turn: Turn) -> Iterator[None]:
    """Ctrl-C ends the answer at its next step; a second one ends the program."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if turn.cancelled:
            raise KeyboardInterrupt
        turn.cancel()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class PlainConsole:
    """Messages from stdin, answers to stdout, notices to stderr."""

    def read(self) -> str | None:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    def answer(self, turn: Turn) -> None:
        with cancelling(turn):
            for piece in turn:
                print(piece, end="", flush=True)
        print(flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def notice(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class TerminalConsole:
    """Line editing, history and completion of commands; answers rendered as Markdown."""

    def __init__(self, commands: Iterable[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from rich.console import Console as RichConsole

        self._rich = RichConsole()
        completer = WordCompleter(list(commands), sentence=True)
        self._session: PromptSession[str] = PromptSession(
            history=_history(), completer=completer, complete_while_typing=False
        )

    def read(self) -> str | None:
        while True:
            try:
                return self._session.prompt("> ")
            except KeyboardInterrupt:
                self.notice("(Ctrl-D or /exit quits)")
            except EOFError:
                return None

    def answer(self, turn: Turn) -> None:
        from rich.live import Live

        text = MarkdownText()
        live = Live(console=self._rich, auto_refresh=False, vertical_overflow="visible")
        drawn = 0.0
        with cancelling(turn), live:
            for piece in turn:
                if finished := text.add(piece):
                    live.update("", refresh=True)
                    live.console.print(_markdown(finished), "")
                    drawn = 0.0
                # Rendering Markdown costs milliseconds: more often than this nobody can see it.
                if (now := time.monotonic()) - drawn > 0.05:
                    live.update(_markdown(text.rest), refresh=True)
                    drawn = now
            live.update(_markdown(text.rest), refresh=True)
        self._rich.print("[dim](stopped)[/dim]\n" if turn.cancelled else "")

    def say(self, text: str) -> None:
        self._rich.print(text, markup=False, highlight=False)

    def notice(self, text: str) -> None:
        self._rich.print(text, style="dim", markup=False, highlight=False)


class MarkdownText:
    """Splits growing Markdown at the last blank line outside a code fence.

    What stands before it can be printed for good; only the rest is drawn again at each piece, so
    an answer longer than the screen scrolls like any other output.
    """

    def __init__(self) -> None:
        self.rest = ""

    def add(self, piece: str) -> str:
        """Take a piece in; returns the part that is finished now, mostly empty."""
        self.rest += piece
        if "\n" not in piece:
            return ""
        fenced, position, cut = False, 0, 0
        for line in self.rest.splitlines(keepends=True):
            position += len(line)
            if line.lstrip().startswith(("```", "~~~")):
                fenced = not fenced
            elif not line.strip() and line.endswith("\n") and not fenced:
                cut = position
        finished, self.rest = self.rest[:cut], self.rest[cut:]
        return finished


def _markdown(text: str) -> Markdown:
    from rich.markdown import Markdown

    return Markdown(text)


def history_path() -> Path:
    """Where the lines of earlier chats are kept."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "smelt" / "chat_history"


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:  # a read-only home: chat works, it only forgets
        return InMemoryHistory()
    return FileHistory(str(path))

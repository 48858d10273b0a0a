"""Progress of long work on stderr: a live line on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STAGES = {
    "load": "reading the model",
    "trace": "tracing",
    "calibrate": "calibrating",
    "resume": "going on with a calibration that was interrupted",
    "save": "saving the portable program",
    "weights": "writing weights",
    "compile": "compiling the step",
    "export": "writing the folder",
    "tune": "timing kernels",
    "prove": "measuring the result",
    "gate": "comparing with the original",
}


@contextmanager
def reporting() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (stage, done, total) that shows where a compilation is."""
    if not sys.stderr.isatty():
        yield _Lines().report
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1)

        def report(stage: str, done: int, total: int) -> None:
            text = _text(stage) or f"pass {stage}"
            progress.update(task, description=text, completed=done, total=max(total, 1))

        yield report


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for (done, total) where stderr is a terminal, None elsewhere; stdout is for results."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """One line when the stage changes, so that a log stays readable."""

    def __init__(self) -> None:
        self._last = ""

    def report(self, stage: str, done: int, total: int) -> None:
        text = _text(stage)
        name = stage.partition(": ")[0]
        if text and name != self._last:
            print(f"smelt: {text}", file=sys.stderr, flush=True)
        self._last = name


def _text(stage: str) -> str:
    """What a stage is called; "calibrate: about 2 GB" has more to say in brackets."""
    name, _, more = stage.partition(": ")
    text = STAGES.get(name, "")
    return f"{text} ({more})" if text and more else text

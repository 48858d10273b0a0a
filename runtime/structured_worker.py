"""A process that compiles grammars for `structured_compiler`, one line of JSON in, one out.

Compiling is native code over text that comes from a request. Some of it takes hours (an enum of
fifty thousand strings) or could end the process, and neither a thread nor a call into a library can
be stopped. This process can: it ends itself, by an alarm that needs no cooperation, when a grammar
takes too long, when it has had nothing to do, or when its pipe is closed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from typing import Any, BinaryIO

START_SECONDS = 300.0  # importing a library on a busy machine
IDLE_SECONDS = 600.0
MEMORY = 4 << 30  # bytes, beyond what the library takes when it is loaded


def _backend(setup: dict[str, Any]) -> Any:
    if setup["backend"] == "xgrammar":
        from .structured_xgrammar import XGrammar

        return XGrammar.from_setup(setup)
    from .structured_llguidance import LLGuidance

    return LLGuidance.from_setup(setup)


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: time is limited, memory is not
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def _answer(backend: Any, job: dict[str, str], log: BinaryIO) -> dict[str, str]:
    log.seek(0)
    log.truncate()
    try:
        compiled = backend.compile(job["kind"], job["text"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a library's panic is no Exception
        return {"error": str(error) or type(error).__name__}
    log.seek(0)
    # xgrammar says only on stderr that it compiled something weaker than what was asked.
    for line in log.read().decode(errors="replace").splitlines():
        if "Warning: " in line:
            return {"error": line.split("Warning: ", 1)[1]}
    return {"compiled": compiled}


def _write(answers: BinaryIO, answer: dict[str, str]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def main() -> None:
    """Read a setup, then jobs {"kind", "text", "seconds"}; write {"compiled"} or {"error"}."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the process that asked
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    with tempfile.TemporaryFile() as log, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(log.fileno(), 2)
        setup = json.loads(jobs.readline())
        try:
            backend = _backend(setup)
        except Exception as error:
            _write(answers, {"error": f"{type(error).__name__}: {error}"})
            return
        _limit_memory()
        _write(answers, {})
        signal.setitimer(signal.ITIMER_REAL, IDLE_SECONDS)
        while line := jobs.readline():
            job = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, job["seconds"])
            _write(answers, _answer(backend, job, log))
            signal.setitimer(signal.ITIMER_REAL, IDLE_SECONDS)


if __name__ == "__main__":
    main()

"""Grammars of one engine: each description is compiled once, apart, within limits, and kept."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Protocol

from .errors import SmeltError, UserError
from .masks import Matcher
from .structured import Structured
from .tokenizer import Tokenizer
from .vocabulary import token_bytes

ORDER = ("xgrammar", "llguidance")  # as `auto` tries them
MAX_COMPILED = 64 << 20  # characters of a serialized grammar
MAX_MESSAGE = 240


class CompiledGrammar(Protocol):
    """A compiled description, shared by requests."""

    def matcher(self) -> Matcher:
        """A new matcher at its start, for one answer."""


class Backend(Protocol):
    """A grammar library over one vocabulary."""

    def setup(self) -> dict[str, Any]: ...

    def translate(self, kind: str, text: str) -> tuple[str, str]: ...

    def load(self, compiled: str) -> CompiledGrammar: ...


class GrammarCompiler:
    """Turns `Structured` into grammars for one vocabulary; nothing is imported before the first.

    vocab_size: of the model's logits; ids that the tokenizer does not have are never allowed.
    eos_token_ids: allowed exactly where a grammar may end. cached: grammars (and failures) kept,
    the least recently used one goes first. seconds: a grammar that takes longer is refused.

    Compiling runs in a process of its own that can be killed, at most two at a time; `close` ends
    them. Threads may share a compiler.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        *,
        cached: int = 128,
        seconds: float = 10.0,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(token for token in eos_token_ids if token < vocab_size)
        self._cached = cached
        self._seconds = seconds
        self._lock = Lock()
        self._kept: OrderedDict[Structured, Future[CompiledGrammar]] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="smelt-compile")
        self._backends: dict[str, Backend] = {}
        self._backends_lock = Lock()
        self._idle: dict[str, list[_Worker]] = {name: [] for name in ORDER}
        self._end = weakref.finalize(self, _end_all, self._idle)

    def compile(self, spec: Structured) -> CompiledGrammar:
        """The grammar of a description. Blocks; raises `UserError`, one line, if there is none."""
        return self.submit(spec).result()

    def submit(self, spec: Structured) -> Future[CompiledGrammar]:
        """The same without waiting. A second request for a description gets the same future."""
        with self._lock:
            future = self._kept.get(spec)
            if future is None or _broke(future):
                future = self._kept[spec] = self._threads.submit(self._compile, spec)
                while len(self._kept) > self._cached:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(spec)
        return future

    def close(self) -> None:
        """End the processes. Grammars that were compiled stay usable."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _compile(self, spec: Structured) -> CompiledGrammar:
        names = ORDER if spec.backend == "auto" else (spec.backend,)
        failed: list[str] = []
        for name in names:
            try:
                return self._compile_with(name, spec)
            except UserError as error:
                failed.append(f"{name}: {_one_line(str(error))}")
        hint = "simplify it" if spec.backend == "auto" else 'simplify it, or try backend="auto"'
        raise UserError(
            f"structured {spec.kind} cannot be used ({'; '.join(failed)}): {hint}"
        ) from None

    def _compile_with(self, name: str, spec: Structured) -> CompiledGrammar:
        backend = self._backend(name)
        kind, text = backend.translate(spec.kind, spec.text)
        return backend.load(self._apart(name, backend, kind, text))

    def _backend(self, name: str) -> Backend:
        with self._backends_lock:
            if name not in self._backends:
                self._backends[name] = self._make(name)
            return self._backends[name]

    def _make(self, name: str) -> Backend:
        if not self._ends:
            raise UserError("the model names no end token, without which no answer would end")
        tokens = token_bytes(self._tokenizer)
        try:
            module = importlib.import_module(f".structured_{name}", __package__)
        except ImportError as error:
            raise UserError(f"it is not installed ({error}): pip install {name}") from error
        if name == "xgrammar":
            backend: Backend = module.XGrammar.of(tokens, self._vocab_size, self._ends)
        else:
            backend = module.LLGuidance(self._tokenizer.to_json(), self._vocab_size, self._ends)
        return backend

    def _apart(self, name: str, backend: Backend, kind: str, text: str) -> str:
        """Compile in another process."""
        with self._lock:
            worker = self._idle[name].pop() if self._idle[name] else None
        if worker is not None and not worker.alive:  # it ends itself when it has nothing to do
            worker.end()
            worker = None
        worker = worker or _Worker(backend.setup())
        try:
            answer = worker.ask({"kind": kind, "text": text, "seconds": self._seconds})
        except EOFError:
            worker.end()
            raise UserError(
                f"it took longer than {self._seconds:g} s, or more memory than a grammar may"
            ) from None
        with self._lock:
            self._idle[name].append(worker)
        if "error" in answer:
            raise UserError(answer["error"])
        if len(answer["compiled"]) > MAX_COMPILED:
            raise UserError(f"it compiles to {len(answer['compiled'])} bytes, too many")
        return answer["compiled"]


class _Worker:
    """A `structured_worker` process."""

    def __init__(self, setup: dict[str, Any]) -> None:
        # The child finds the packages where this process did.
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__package__}.structured_worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **paths},
        )
        try:
            problem = self.ask(setup).get("error")
        except EOFError:
            self._process.wait()
            problem = f"exit code {self._process.returncode}"
        if problem is not None:
            self.end()
            raise SmeltError(
                f"the process that compiles grammars did not start ({_one_line(problem)}): "
                "run `smelt doctor`, or leave `structured` out"
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: dict[str, Any]) -> dict[str, str]:
        """Its answer; `EOFError` if it ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        answer: dict[str, str] = json.loads(line)
        return answer

    def end(self) -> None:
        self._process.kill()
        # Closes the pipes, and waits, so that no process is left behind.
        self._process.communicate()


def _broke(future: Future[CompiledGrammar]) -> bool:
    """Whether it failed for another reason than its description, and may be tried again."""
    error = future.exception() if future.done() and not future.cancelled() else None
    return error is not None and not isinstance(error, UserError)


def _end_all(idle: dict[str, list[_Worker]]) -> None:
    for workers in idle.values():
        while workers:
            workers.pop().end()


def _one_line(message: str) -> str:
    """A library's message without its own place in the source, cut to a readable length."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = " ".join(lines[:4])
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", text)
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."

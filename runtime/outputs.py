"""Answers as they arrive and as they are in the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .detokenizer import Decoder, TextStream
from .errors import SmeltError
from .logprobs import Logprobs
from .sequence import StepOutput


@dataclass
class Completion:
    """One of the answers to a prompt.

    text: the decoded `token_ids`, cut before a stop string. finish_reason: "stop" (end token, stop
    string, end of the structure), "length" (max_tokens or the context), "abort", "timeout" or
    "error". logprobs: one a token, where they were asked for; cumulative_logprob: their sum.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logprobs: list[Logprobs] | None = None
    cumulative_logprob: float | None = None


@dataclass
class Output:
    """What a prompt was answered with.

    outputs: the `n` answers; text, token_ids, finish_reason and logprobs are the first one's.
    prompt_logprobs: of each prompt token but the first. ttft_s: seconds from the request to its
    first token. decode_tokens_per_s: rate of the tokens after the first, 0 where there are none.
    reused_tokens: of the prompt, found in the cache. error: what happened, where it failed.
    """

    outputs: list[Completion] = field(default_factory=lambda: [Completion()])
    prompt_tokens: int = 0
    ttft_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    reused_tokens: int = 0
    prompt_logprobs: list[Logprobs] | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[Logprobs] | None:
        return self.outputs[0].logprobs


class _Answer:
    """A completion that grows. Its text is decoded when it is asked for, not when tokens arrive:
    the engine's next step need not wait for it."""

    def __init__(self, index: int, tokenizer: Decoder | None) -> None:
        self.completion = Completion(index)
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._undecoded: deque[int] = deque()
        self._piece = ""

    def take(self, step: StepOutput) -> None:
        completion = self.completion
        completion.token_ids += step.token_ids
        self._piece += step.text
        if self._stream is not None:
            self._undecoded += step.token_ids[: len(step.token_ids) - step.silent_end]
        if step.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + step.logprobs
        if step.finish_reason:
            completion.finish_reason = step.finish_reason

    def decode(self) -> str:
        """The text that became final since the last call."""
        piece, self._piece = self._piece, ""
        if self._stream is not None:
            while self._undecoded:
                piece += self._stream.push(self._undecoded.popleft())[0]
            if self.completion.finish_reason:
                piece += self._stream.finish()[0]
                self._stream = None
        self.completion.text += piece
        return piece


class Collector:
    """Gathers the step outputs of one request and its times.

    tokenizer: decodes texts here; None takes the engine's. samples: how many sequences answer;
    keep: how many of them are returned, the most likely ones; logprobs: whether to return them.
    """

    def __init__(
        self,
        prompt_tokens: int,
        tokenizer: Decoder | None = None,
        samples: int = 1,
        keep: int = 1,
        logprobs: bool = False,
    ) -> None:
        self.id = -1
        self.exception: Exception | None = None
        self._answers = [_Answer(i, tokenizer) for i in range(samples)]
        self._output = Output([a.completion for a in self._answers], prompt_tokens)
        self._keep, self._logprobs = keep, logprobs
        self._running = samples
        self._tokens = 0
        self._added = time.perf_counter()
        self._first = self._last = 0.0

    @property
    def done(self) -> bool:
        return not self._running

    @property
    def output(self) -> Output:
        """The answers so far, every final piece of text in them."""
        for answer in self._answers:
            answer.decode()
        return self._output

    def take(self, step: StepOutput) -> None:
        """Enter what a step gave."""
        output = self._output
        self._answers[step.index].take(step)
        if step.token_ids:
            self._last = time.perf_counter()
            if not self._tokens:
                self._first = self._last
                output.ttft_s = self._first - self._added
            self._tokens += len(step.token_ids)
        if step.prompt_logprobs is not None:
            output.prompt_logprobs = step.prompt_logprobs
        output.reused_tokens = max(output.reused_tokens, step.reused_tokens)
        if step.error is not None:
            self.exception = step.error
            output.error = f"{type(step.error).__name__}: {step.error}"
        if step.finish_reason:
            self._running -= 1
            if self.done:
                self._finish()

    def piece(self) -> str:
        """Text of the first answer that became final since the last call."""
        return self._answers[0].decode()

    def raise_error(self) -> None:
        if isinstance(self.exception, SmeltError):
            raise self.exception
        if self.exception is not None:
            raise SmeltError(f"the step failed: {self._output.error}") from self.exception

    def _finish(self) -> None:
        output = self._output
        if self._last > self._first:
            output.decode_tokens_per_s = (self._tokens - 1) / (self._last - self._first)
        completions = [answer.completion for answer in self._answers]
        for completion in completions:
            if completion.logprobs is not None:
                completion.cumulative_logprob = sum(p.logprob for p in completion.logprobs)
        if self._keep < len(completions):
            completions.sort(key=_mean_logprob, reverse=True)
        output.outputs = completions[: self._keep]
        if not self._logprobs:
            for completion in output.outputs:
                completion.logprobs = None


def _mean_logprob(completion: Completion) -> float:
    return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))


class Stream:
    """Iterates over an answer's pieces of text; `output` is the answer so far, then the whole.

    Leaving the loop early and calling `close` (or `with`) ends the request. Setting `cancelled`
    does so at the next step, and may be done in a signal handler.
    """

    def __init__(
        self, request: Collector, pump: Callable[[], None], abort: Callable[[int], None]
    ) -> None:
        self._request = request
        self._pump = pump
        self._abort = abort
        self._pieces: deque[str] = deque()
        self.cancelled = False

    @property
    def output(self) -> Output:
        piece = self._request.piece()
        if piece:
            self._pieces.append(piece)
        return self._request.output

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            if self._pieces:
                return self._pieces.popleft()
            piece = self._request.piece()
            if piece:
                return piece
            if self._request.done:
                self._request.raise_error()
                raise StopIteration
            if self.cancelled:
                self.close()
            else:
                self._pump()

    def close(self) -> None:
        """End the request if it still runs; its text so far stays in `output`."""
        if not self._request.done:
            self._abort(self._request.id)
            while not self._request.done:
                self._pump()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A consumer that went away must not leave its request running; the next step reports it.
        if not self._request.done:
            self._abort(self._request.id)

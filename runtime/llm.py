"""The library's front: open an artifact and ask it for text.

    llm = smelt.load("OUT")
    outputs = llm.generate(["Once upon a time"], smelt.SamplingParams(max_tokens=64))

One `LLM` owns one engine; calls from one thread at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import SmeltError, UserError
from .sampling_params import SamplingParams
from .sequence import Session, StepOutput
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from .artifact import LoadedArtifact

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass
class Output:
    """The answer to one prompt.

    text: the decoded `token_ids`, cut before a stop string. finish_reason: "stop" (end token or
    stop string), "length" (max_tokens or the context), "abort" or "error" (then `error` says what).
    ttft_s: seconds from the request to its first token. decode_tokens_per_s: rate of the tokens
    after the first, 0 where there are none. reused_tokens: of the prompt, found in the cache.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    ttft_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    reused_tokens: int = 0
    error: str | None = None


class Stream:
    """Iterates over an answer's pieces of text; `output` is the answer so far, then the whole.

    Leaving the loop early and calling `close` (or `with`) ends the request. Setting `cancelled`
    does so at the next step, and may be done in a signal handler.
    """

    def __init__(self, llm: LLM, request: _Request) -> None:
        self._llm = llm
        self._request = request
        self.cancelled = False

    @property
    def output(self) -> Output:
        return self._request.output

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            piece = self._request.next_piece()
            if piece:
                return piece
            if self._request.done:
                self._request.raise_error()
                raise StopIteration
            if self.cancelled:
                self.close()
            else:
                self._llm._pump()

    def close(self) -> None:
        """End the request if it still runs; its text so far stays in `output`."""
        if not self._request.done:
            self._llm.engine.abort(self._request.id)
            while not self._request.done:
                self._llm._pump()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A consumer that went away must not leave its request running; the next step reports it.
        if not self._request.done:
            self._llm.engine.abort(self._request.id)


class _Request:
    """Collects one request's step outputs and its times."""

    def __init__(self, request_id: int, prompt_tokens: int) -> None:
        self.id = request_id
        self.output = Output(prompt_tokens=prompt_tokens)
        self.done = False
        self.exception: Exception | None = None
        self._pieces: deque[str] = deque()
        self._added = time.perf_counter()
        self._first = self._last = 0.0

    def take(self, step: StepOutput) -> None:
        output = self.output
        if step.token_ids:
            self._last = time.perf_counter()
            if not output.token_ids:
                self._first = self._last
                output.ttft_s = self._first - self._added
            output.token_ids += step.token_ids
        if step.text:
            output.text += step.text
            self._pieces.append(step.text)
        output.reused_tokens = max(output.reused_tokens, step.reused_tokens)
        if step.finish_reason:
            self.done = True
            output.finish_reason = step.finish_reason
            if self._last > self._first:
                seconds = self._last - self._first
                output.decode_tokens_per_s = (len(output.token_ids) - 1) / seconds
            if step.error is not None:
                self.exception = step.error
                output.error = f"{type(step.error).__name__}: {step.error}"

    def next_piece(self) -> str:
        return self._pieces.popleft() if self._pieces else ""

    def raise_error(self) -> None:
        if isinstance(self.exception, SmeltError):
            raise self.exception
        if self.exception is not None:
            raise SmeltError(f"the step failed: {self.output.error}") from self.exception


class LLM:
    """A loaded artifact. path: its folder; kv_cache_tokens or kv_cache_fraction size the cache."""

    def __init__(
        self,
        path: str | Path,
        *,
        kv_cache_tokens: int | None = None,
        kv_cache_fraction: float | None = None,
    ) -> None:
        from .artifact import open_artifact

        artifact = open_artifact(Path(path))
        model = artifact.manifest.model
        self.artifact: LoadedArtifact | None = artifact
        self.tokenizer = Tokenizer(artifact.folder)
        eos = _ids(model.get("eos_token_ids", model.get("eos_token_id")))
        if not eos and self.tokenizer.eos_token_id is not None:
            eos = [self.tokenizer.eos_token_id]
        self.bos_token_id = _first_id(model.get("bos_token_id"), self.tokenizer.bos_token_id)
        self.engine = Engine(
            artifact.program,
            tokenizer=self.tokenizer,
            eos_token_ids=eos,
            max_position=model.get("max_position"),
            kv_cache_tokens=kv_cache_tokens,
            kv_cache_fraction=kv_cache_fraction,
        )
        self._requests: dict[int, _Request] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Answer all prompts, batched; outputs in the order of the prompts.

        prompts: a text, a list of token ids, or a list of either. params: one for all, or one each.
        A single failed request has `error` set; if all fail, the first error is raised.
        """
        many = _prompt_list(prompts)
        each = _params_list(params, len(many))
        encoded = [self._encode(prompt) for prompt in many]
        requests: list[_Request] = []
        try:
            for tokens, wanted in zip(encoded, each, strict=True):
                requests.append(self._add(tokens, wanted))
            while not all(request.done for request in requests):
                self._pump()
        finally:
            for request in requests:
                if not request.done:
                    self.engine.abort(request.id)
        if requests and all(request.exception for request in requests):
            requests[0].raise_error()
        return [request.output for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        session: Session | None = None,
    ) -> Stream:
        """Pieces of the answer as they become final. session: reuse and keep its cache."""
        request = self._add(self._encode(prompt), params or SamplingParams(), session)
        return Stream(self, request)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **variables: Any
    ) -> Output:
        """The assistant's answer to {"role", "content"} messages, by the model's chat template.

        variables: further names for the template. `UserError` where the model has no template.
        """
        params = params or SamplingParams(max_tokens=None)
        with self.stream(self.chat_prompt(messages, **variables), self.chat_params(params)) as s:
            for _ in s:
                pass
            return s.output

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer."""
        template = self.tokenizer.chat_template
        if template is None:
            raise UserError("this model has no chat template: use generate with the whole text")
        # The template writes BOS itself where the model wants one.
        return self.tokenizer.encode(template.render(messages, **variables), False)

    def chat_params(self, params: SamplingParams) -> SamplingParams:
        """The same parameters, ending also at the tokenizer's own end token.

        Templates end turns with it even where the generation configuration names other ids.
        """
        end = self.tokenizer.eos_token_id
        if end is None or params.ignore_eos or end in params.stop_token_ids:
            return params
        return replace(params, stop_token_ids=(*params.stop_token_ids, end))

    def logits(
        self, prompts: Sequence[Sequence[int]], last: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """One float32 [len, V] tensor a prompt; row i: the logits after its tokens 0 to i.

        last: of each prompt, only the rows of so many last tokens.
        """
        from .scoring import score

        return score(self.engine, prompts, last)

    def close(self) -> None:
        """Release caches and program; the object cannot be used after it."""
        for request in self._requests.values():
            self.engine.abort(request.id)
        self._requests.clear()
        self.engine.caches.clear()
        self.artifact = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        tokens = self.tokenizer.encode(prompt)
        if not tokens and self.bos_token_id is not None:
            return [self.bos_token_id]
        if not tokens:
            raise UserError("the prompt is empty, and this model has no BOS token to begin with")
        return tokens

    def _add(
        self, tokens: list[int], params: SamplingParams, session: Session | None = None
    ) -> _Request:
        if self.artifact is None:
            raise UserError("this LLM is closed: load the artifact again")
        request = _Request(self.engine.add_request(tokens, params, session=session), len(tokens))
        self._requests[request.id] = request
        return request

    def _pump(self) -> None:
        """One engine step; its outputs go to whoever waits for them."""
        for step in self.engine.step():
            request = self._requests.get(step.id)
            if request is None:
                continue
            request.take(step)
            if request.done:
                del self._requests[step.id]


def load(
    path: str | Path,
    *,
    kv_cache_tokens: int | None = None,
    kv_cache_fraction: float | None = None,
) -> LLM:
    """Open an artifact for generation.

    kv_cache_tokens: tokens the KV cache holds over all sequences; kv_cache_fraction: of the free
    memory (0.4 if neither is given). Raises `UserError` or `SmeltError` naming what is wrong.
    """
    return LLM(path, kv_cache_tokens=kv_cache_tokens, kv_cache_fraction=kv_cache_fraction)


def _first_id(*candidates: int | None) -> int | None:
    return next((int(c) for c in candidates if c is not None), None)


def _ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(token) for token in value]


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _params_list(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UserError(f"{count} prompts but {len(params)} parameters: give one, or one each")
    return list(params)

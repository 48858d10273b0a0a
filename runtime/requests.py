"""From a prompt and its parameters to the sequences that answer it, every input checked."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from .detokenizer import TextStream
from .errors import UserError
from .processors import encode_bad_words
from .sampler import SamplerState
from .sampling_params import SamplingParams
from .sequence import Sequence
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .engine import Engine
    from .structured import Structured
    from .structured_compiler import CompiledGrammar, GrammarCompiler


class RequestFactory:
    """Makes a request's sequences for one engine; `UserError` for what can never run."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next_id = 0
        self._compiler: GrammarCompiler | None = None

    def make(
        self, token_ids: Items[int], params: SamplingParams, detokenize: bool
    ) -> list[Sequence]:
        """One sequence an answer; all but the first begin when the first one's prompt is done."""
        engine = self._engine
        prompt = list(token_ids)
        self._check_prompt(prompt)
        if params.stop and engine.tokenizer is None:
            raise UserError("stop strings need a tokenizer: give one to the engine, or token ids")
        params.check_vocabulary(engine.program.vocab_size)
        limit = engine.capacity
        if params.max_tokens is not None:
            limit = min(limit, len(prompt) + params.max_tokens)
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= engine.eos_token_ids
        self._bad_words(params)
        count = params.samples
        made = []
        for index in range(count):
            sequence = Sequence(self._next_id, list(prompt), params, limit, ends, index)
            if engine.tokenizer is not None and (detokenize or params.stop):
                sequence.text = TextStream(engine.tokenizer, params.stop)
            sequence.logprobs = params.logprobs is not None or count > params.n
            if params.prompt_logprobs is not None and index == 0:
                sequence.prompt_logprobs = []
                sequence.fresh = True
            made.append(sequence)
        self._next_id += 1
        return made

    def compile(self, structured: Structured) -> Future[CompiledGrammar]:
        """The grammar of a request, worked out in another process while the engine goes on."""
        engine = self._engine
        if not isinstance(engine.tokenizer, Tokenizer):
            raise UserError("structured output needs the model's tokenizer")
        if self._compiler is None:
            from .structured_compiler import GrammarCompiler

            size, ends = engine.program.vocab_size, engine.eos_token_ids
            self._compiler = GrammarCompiler(engine.tokenizer, size, ends)
        return self._compiler.submit(structured)

    def start(self, samples: Items[Sequence], grammar: CompiledGrammar | None = None) -> None:
        """Give sequences what chooses their tokens; each its own matcher of `grammar`."""
        for sequence in samples:
            sequence.sampler = SamplerState(
                sequence.params,
                sequence.prompt_length,
                sequence.end_tokens,
                bad_words=self._bad_words(sequence.params),
                matcher=grammar.matcher() if grammar else None,
                index=sequence.index,
            )

    def close(self) -> None:
        """End the processes that compile grammars."""
        if self._compiler is not None:
            self._compiler.close()

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        engine = self._engine
        return encode_bad_words(params.bad_words, engine.tokenizer, engine.program.vocab_size)

    def _check_prompt(self, prompt: list[int]) -> None:
        engine = self._engine
        size = engine.program.vocab_size
        if not prompt:
            raise UserError("the prompt has no tokens: give some text")
        if min(prompt) < 0 or max(prompt) >= size:
            wrong = next(t for t in prompt if not 0 <= t < size)
            raise UserError(f"token id {wrong} is outside the model's vocabulary of {size}")
        if len(prompt) >= engine.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model's context is "
                f"{engine.context}: shorten the prompt, so that an answer fits behind it"
            )
        if len(prompt) >= engine.capacity:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the KV cache holds {engine.capacity}: "
                "shorten the prompt, or raise --kv-cache-tokens"
            )

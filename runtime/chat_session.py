"""A conversation: messages, and the prompt made of them.

When a conversation outgrows the context, its oldest turns are dropped (the system message stays),
and the turn says how many. A model without a chat template continues plain text instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .llm import LLM, Output, Stream
from .sampling_params import SamplingParams

# Room kept for the answer when old turns are dropped: this share of the context, at least.
ANSWER_SHARE = 0.25


@dataclass
class ChatStats:
    """Totals over the conversation; prompt tokens split into computed and found in the cache."""

    turns: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    dropped_messages: int = 0
    ttft_s: float = 0.0
    decode_tokens_per_s: float = 0.0


class Turn:
    """One answer under way: iterate for its pieces; `dropped` old messages did not fit."""

    def __init__(self, stream: Stream, dropped: int, done: Callable[[Output], None]) -> None:
        self.dropped = dropped
        self._stream = stream
        self._done: Callable[[Output], None] | None = done

    @property
    def output(self) -> Output:
        return self._stream.output

    @property
    def cancelled(self) -> bool:
        return self._stream.cancelled

    def cancel(self) -> None:
        """Ask for the end of the answer; safe in a signal handler."""
        self._stream.cancelled = True

    def __iter__(self) -> Turn:
        return self

    def __next__(self) -> str:
        try:
            return next(self._stream)
        except BaseException:  # the end, an error or Ctrl-C: what was said stays said
            self.close()
            raise

    def close(self) -> None:
        """Stop the answer; what was said so far becomes part of the conversation."""
        self._stream.close()
        if self._done is not None:
            done, self._done = self._done, None
            done(self.output)


class ChatSession:
    """Multi-turn chat over one `LLM`; what its prefix cache holds of earlier turns is not computed
    again.

    system: the system message, None for none. params: for every answer; max_tokens None lets an
    answer fill what is left of the context. variables: further names for the chat template.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        system: str | None = None,
        params: SamplingParams | None = None,
        **variables: Any,
    ) -> None:
        self.llm = llm
        self.system = system
        self.params = params or SamplingParams(max_tokens=None)
        self.variables = variables
        self.messages: list[dict[str, str]] = []
        self.stats = ChatStats()
        self.templated = llm.tokenizer.chat_template is not None

    def send(self, text: str) -> Turn:
        """Say something; iterate over the turn for the answer. Raises `UserError` if too long."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, dropped = self._fit(messages)
        params = self.llm.chat_params(self.params) if self.templated else self.params
        stream = self.llm.stream(prompt, params)
        kept = messages[dropped:]

        def done(output: Output) -> None:
            if output.finish_reason == "error":
                return  # the conversation goes on as if nothing had been said
            self.messages = [*kept, {"role": "assistant", "content": output.text}]
            self._count(output, dropped)

        return Turn(stream, dropped, done)

    def reset(self) -> None:
        """Forget the conversation, keep the system message."""
        self.messages = []
        self.stats = ChatStats()

    def set_system(self, text: str | None) -> None:
        """Another system message; takes effect with the next turn."""
        self.system = text or None

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON."""
        data = {"system": self.system, "messages": self.messages}
        try:
            Path(path).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error

    def load(self, path: str | Path) -> None:
        """Continue a conversation written by `save`; `UserError` if the file is not one."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            messages = [
                {"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]
            ]
            system = data.get("system")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no conversation that /save wrote: {error!r}") from error
        self.reset()
        self.system = str(system) if system else None
        self.messages = messages

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """The prompt's tokens, and how many of the oldest messages had to be left out."""
        capacity = self.llm.engine.capacity
        reserve = int(capacity * ANSWER_SHARE)
        if self.params.max_tokens is not None:
            reserve = min(reserve, self.params.max_tokens)
        dropped = 0
        while True:
            prompt = self._prompt(messages[dropped:])
            if len(prompt) + reserve <= capacity:
                return prompt, dropped
            # A conversation must begin with a user's message, or templates refuse it.
            following = [
                i for i in range(dropped + 1, len(messages)) if messages[i]["role"] == "user"
            ]
            if following:
                dropped = following[0]
            elif len(prompt) < capacity:
                return prompt, dropped
            else:
                raise UserError(
                    f"this message alone makes {len(prompt)} tokens and the context holds "
                    f"{capacity}: shorten it (or the system message)"
                )

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.templated:
            text = "".join(message["content"] for message in messages)
            return self.llm.tokenizer.encode((self.system or "") + text)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.llm.chat_prompt([*system, *messages], **self.variables)

    def _count(self, output: Output, dropped: int) -> None:
        stats = self.stats
        stats.turns += 1
        stats.prefilled_tokens += output.prompt_tokens - output.reused_tokens
        stats.reused_tokens += output.reused_tokens
        stats.generated_tokens += len(output.token_ids)
        stats.dropped_messages += dropped
        stats.ttft_s = output.ttft_s
        stats.decode_tokens_per_s = output.decode_tokens_per_s

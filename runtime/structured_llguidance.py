"""Grammars by llguidance (Microsoft; derivatives of regular expressions and an Earley parser).

Imported when a request asks. It knows nothing of a model's further end tokens, so ends are kept
here: they are allowed where the library would allow its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import llguidance

from .bitmask import set_bits
from .errors import UserError
from .structured_regex import portable_regex
from .structured_rehearsal import rehearse
from .structured_schema import nested_id

if TYPE_CHECKING:
    import torch

# Spaces between the parts of a JSON text: without a limit, a model may never stop writing them.
_JSON: Any = {"whitespace_pattern": r"[ \n\r\t]{1,16}"}


class LLGuidance:
    """The library over one vocabulary: `compile` in a process apart, `load` in this one."""

    def __init__(self, tokenizer: str, vocab_size: int, ends: Sequence[int]) -> None:
        self._setup = {"tokenizer": tokenizer, "vocab_size": vocab_size, "ends": list(ends)}
        self._ends = list(ends)
        self._vocab_size = vocab_size
        size = max(vocab_size, len_of(tokenizer))
        self._tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=size, eos_token=ends[0])

    def setup(self) -> dict[str, Any]:
        """What another process needs to build the same (`from_setup`)."""
        return {"backend": "llguidance", **self._setup}

    @classmethod
    def from_setup(cls, setup: dict[str, Any]) -> LLGuidance:
        return cls(setup["tokenizer"], setup["vocab_size"], setup["ends"])

    @staticmethod
    def translate(kind: str, text: str) -> tuple[str, str]:
        """The kind and text to `compile`; `UserError` for what llguidance reads differently."""
        if kind == "regex":
            text = portable_regex(text, "llguidance")
        elif kind == "json_schema" and nested_id(json.loads(text)):
            raise UserError("it does not resolve references across $id below the top")
        return kind, text

    def compile(self, kind: str, text: str) -> str:
        """The grammar in llguidance's own form, known to compile within its limits."""
        grammar = _grammar(kind, text)
        first = self._start(grammar)

        def start() -> tuple[Callable[[], bytes], Callable[[int], bool]]:
            matcher = first.deep_copy()
            return matcher.compute_bitmask, matcher.consume_token

        # The library allows its own end token, the first.
        rehearse(start, self._ends[:1])
        return grammar

    def load(self, compiled: str) -> LLGuidanceCompiled:
        return LLGuidanceCompiled(self._start(compiled), self._ends, self._tokenizer.vocab_size)

    def _start(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # an empty language is noticed here
        if matcher.is_error():
            raise UserError(matcher.get_error())
        return matcher


def len_of(tokenizer: str) -> int:
    """One more than the largest id of a serialized tokenizer."""
    table = json.loads(tokenizer)
    added = (token["id"] for token in table.get("added_tokens", []))
    return 1 + max(max(table["model"]["vocab"].values()), max(added, default=0))


def _grammar(kind: str, text: str) -> str:
    make = llguidance.LLMatcher
    if kind in ("json_schema", "json_object"):
        return str(make.grammar_from_json_schema(text, overrides=_JSON))
    if kind == "regex":
        return str(make.grammar_from_regex(text))
    if kind == "choice":
        return str(
            make.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(text))))
        )
    from llguidance.gbnf_to_lark import gbnf_to_lark

    return str(make.grammar_from_lark(gbnf_to_lark(text)))


class LLGuidanceCompiled:
    """A compiled grammar, shared by the requests that ask for it."""

    def __init__(self, start: llguidance.LLMatcher, ends: Sequence[int], vocab_size: int) -> None:
        self._start = start
        self._ends = ends
        self._vocab_size = vocab_size

    def matcher(self) -> LLGuidanceMatcher:
        """A new matcher at the start of the grammar."""
        return LLGuidanceMatcher(self._start.deep_copy(), self._ends, self._vocab_size)


class LLGuidanceMatcher:
    """See `masks.Matcher`."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: Sequence[int], vocab_size: int) -> None:
        self.error: str | None = None
        self.finished = False
        self._matcher = matcher
        self._ends = ends
        self._words = (vocab_size + 31) // 32

    def fill(self, mask: torch.Tensor, draft: Sequence[int] = ()) -> bool:
        if self.finished or self.error or not set(draft).isdisjoint(self._ends):
            return False
        matcher = self._matcher
        # Asked first, because consuming a wrong token is an error that lasts.
        if draft and matcher.validate_tokens(list(draft)) < len(draft):
            return False
        if draft:
            matcher.consume_tokens(list(draft))
        self._write(mask)
        if draft:
            matcher.rollback(len(draft))
        if matcher.is_error():
            self.error = matcher.get_error().split("\n")[0]
            return False
        return True

    def _write(self, mask: torch.Tensor) -> None:
        # The tokenizer may have more tokens than the model.
        whole = mask if mask.numel() == self._words else mask.new_zeros(self._words)
        self._matcher.unsafe_compute_mask_ptr(whole.data_ptr(), whole.numel() * 4)
        if whole is not mask:
            mask.copy_(whole[: mask.numel()])
        set_bits(mask, self._ends, bool(self._matcher.is_accepting()))

    def accept(self, tokens: Sequence[int]) -> bool:
        for token in tokens:
            if self.finished or self.error:
                return False
            if token in self._ends:
                self.finished = bool(self._matcher.is_accepting())
                if not self.finished:
                    return False
            elif not self._matcher.consume_token(token):
                self.error = self._matcher.get_error().split("\n")[0]
                return False
        return True

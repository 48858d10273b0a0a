"""Grammars by xgrammar (Dong et al. 2024, "XGrammar: Flexible and Efficient Structured
Generation Engine for Large Language Models").

Imported when a request asks; importing xgrammar imports transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import xgrammar

from .errors import UserError
from .structured_regex import portable_regex
from .structured_rehearsal import rehearse
from .structured_schema import for_xgrammar, unenforced

if TYPE_CHECKING:
    import torch

# Spaces between the parts of a JSON text: without a limit, a model may never stop writing them.
MOST_SPACES = 16


class XGrammar:
    """The library over one vocabulary: `compile` in a process apart, `load` in this one."""

    def __init__(self, info: xgrammar.TokenizerInfo) -> None:
        self._info = info
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    @classmethod
    def of(cls, tokens: Sequence[bytes | None], vocab_size: int, ends: Sequence[int]) -> XGrammar:
        """tokens: the bytes of each id, None where it is never allowed; ends: the end tokens."""
        # An empty token is one that no grammar allows; so are the ids up to vocab_size.
        encoded = [token or b"" for token in tokens[:vocab_size]]
        encoded += [b""] * (vocab_size - len(encoded))
        return cls(
            xgrammar.TokenizerInfo(
                encoded,
                xgrammar.VocabType.RAW,
                vocab_size=vocab_size,
                stop_token_ids=list(ends),
            )
        )

    def setup(self) -> dict[str, Any]:
        """What another process needs to build the same (`from_setup`)."""
        return {"backend": "xgrammar", "tokenizer": self._info.serialize_json()}

    @classmethod
    def from_setup(cls, setup: dict[str, Any]) -> XGrammar:
        return cls(xgrammar.TokenizerInfo.deserialize_json(setup["tokenizer"]))

    @staticmethod
    def translate(kind: str, text: str) -> tuple[str, str]:
        """The kind and text to `compile`; `UserError` for what xgrammar does not honour in full."""
        if kind == "regex":
            return kind, portable_regex(text, "xgrammar")
        if kind == "choice":
            return "grammar", "root ::= " + " | ".join(map(_literal, json.loads(text)))
        if kind == "json_schema":
            schema = json.loads(text)
            if reason := unenforced(schema):
                raise UserError(f"it does not enforce {reason}")
            text = json.dumps(for_xgrammar(schema))
        return kind, text

    def compile(self, kind: str, text: str) -> str:
        """The compiled grammar as text. Raises whatever xgrammar raises; may never return."""
        if kind in ("json_schema", "json_object"):
            compiled = self._compiler.compile_json_schema(
                text, any_whitespace=True, max_whitespace_cnt=MOST_SPACES
            )
        elif kind == "regex":
            compiled = self._compiler.compile_regex(text)
        else:
            compiled = self._compiler.compile_grammar(text)
        mask = xgrammar.allocate_token_bitmask(1, self._info.vocab_size)

        def start() -> tuple[Callable[[], bytes], Callable[[int], bool]]:
            matcher = XGrammarMatcher(compiled, self._info)

            def fill() -> bytes:
                matcher.fill(mask[0])
                return mask.numpy().tobytes()

            return fill, lambda token: matcher.accept([token])

        rehearse(start, self._info.stop_token_ids)
        return str(compiled.serialize_json())

    def load(self, compiled: str) -> XGrammarCompiled:
        return XGrammarCompiled(
            xgrammar.CompiledGrammar.deserialize_json(compiled, self._info), self._info
        )


class XGrammarCompiled:
    """A compiled grammar, shared by the requests that ask for it."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, info: xgrammar.TokenizerInfo) -> None:
        self._compiled = compiled
        self._info = info

    def matcher(self) -> XGrammarMatcher:
        """A new matcher at the start of the grammar."""
        return XGrammarMatcher(self._compiled, self._info)


class XGrammarMatcher:
    """See `masks.Matcher`."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, info: xgrammar.TokenizerInfo) -> None:
        self.error: str | None = None
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._ends = frozenset(info.stop_token_ids)
        # No grammar has them, and the library complains on stderr about each that is offered.
        self._never = self._ends | frozenset(info.special_token_ids)

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_terminated())

    def fill(self, mask: torch.Tensor, draft: Sequence[int] = ()) -> bool:
        if self.finished or not self._never.isdisjoint(draft):
            return False
        moved = 0
        try:
            for token in draft:
                if not self._matcher.accept_token(token):
                    return False
                moved += 1
            # Returns False, and may leave the mask, where everything is allowed.
            if not self._matcher.fill_next_token_bitmask(mask[None], 0):
                mask.fill_(-1)
        finally:
            if moved:
                self._matcher.rollback(moved)
        return True

    def accept(self, tokens: Iterable[int]) -> bool:
        return all(self._matcher.accept_token(token) for token in tokens)


def _literal(text: str) -> str:
    """A string of a grammar: what is not plain ASCII is written by its code."""
    plain = (c if (c.isascii() and c.isalnum()) or c in " -_" else f"\\U{ord(c):08x}" for c in text)
    return '"' + "".join(plain) + '"'

"""Calibration text: what the quantizer runs through the model, cut into sequences.

Sources are `builtin`, a .txt or a .jsonl file (objects with "text", or with "messages", which go
through the model's chat template), and `hf:NAME`, a Hugging Face dataset with the same columns. The
text is tokenized document by document in a seeded order and cut into sequences of equal length;
what does not fit is counted, never dropped silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from smelt.runtime.errors import UserError

from .calibration_dataset import PREFIX, DatasetText
from .calibration_text import BUILTIN, FileText, Text

__all__ = ["BUILTIN", "Calibration", "Tokenizer", "load_calibration"]

# Tokens looked at to tell whether the tokenizer knows the text's language, and how many may be
# unknown or halves of characters.
_PROBE = 4000
_MAX_BROKEN = 0.5


class Tokenizer(Protocol):
    """What is needed of a tokenizer; transformers' have it. Chat files also need
    `apply_chat_template(messages, tokenize=False)`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Calibration(Sequence[tuple[int, ...]]):
    """Token sequences, all of one length, and where they come from.

    sha256: of a file's bytes, or of the text taken from a dataset. tokens: how many the sequences
    hold. dropped: what was left out, in words. revision: the dataset's commit, where it is known.
    """

    token_lists: tuple[tuple[int, ...], ...]
    source: str
    sha256: str
    tokens: int
    dropped: tuple[str, ...] = ()
    revision: str | None = None

    def __len__(self) -> int:
        return len(self.token_lists)

    def __getitem__(self, index: Any) -> Any:
        return self.token_lists[index]

    def to_json(self) -> dict[str, Any]:
        """For the manifest: everything but the tokens themselves."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {
            "source": self.source,
            **revision,
            "sha256": self.sha256,
            "samples": len(self.token_lists),
            "tokens": self.tokens,
            "dropped": list(self.dropped),
        }


def load_calibration(
    source: str | Path,
    tokenizer: Tokenizer,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    model_folder: Path | None = None,
) -> Calibration:
    """Up to `samples` sequences of `seqlen` tokens.

    source: as `FileText` and `DatasetText` say. Raises UserError for what they do, and for a text
    too short for one sequence or in a language the tokenizer does not know.
    """
    if samples < 1 or seqlen < 2:
        raise UserError(
            f"calibration needs at least 1 sample of 2 tokens, not {samples} of {seqlen}"
        )
    text: Text
    if str(source).startswith(PREFIX):
        text = DatasetText(str(source), tokenizer, seed)
    else:
        text = FileText(source, tokenizer, seed, model_folder)
    stream, used = _encode(text, tokenizer, samples * seqlen)
    count = min(samples, len(stream) // seqlen)
    if count == 0:
        raise UserError(
            f"{text.where} holds {len(stream)} tokens, less than one calibration sample of "
            f"{seqlen}; give a longer text or --calib-seqlen {max(2, len(stream))}"
        )
    lists = tuple(tuple(stream[i * seqlen : (i + 1) * seqlen]) for i in range(count))
    dropped = text.left_out(used)
    if len(stream) > count * seqlen:
        dropped.append(f"{len(stream) - count * seqlen} tokens after the last full sample")
    if count < samples:
        dropped.append(f"{samples - count} of {samples} samples asked for: the text is too short")
    return Calibration(
        lists, text.name, text.sha256(), count * seqlen, tuple(dropped), text.revision
    )


def _encode(text: Text, tokenizer: Tokenizer, wanted: int) -> tuple[list[int], int]:
    """(tokens of as many documents as give `wanted`, how many documents that took)."""
    stream: list[int] = []
    used = 0
    for document in text.documents:
        if document.special:
            stream += tokenizer.encode(document.text)
        else:
            stream += tokenizer.encode(document.text, add_special_tokens=False)
        used += 1
        if len(stream) >= wanted:
            break
    _check_language(text.where, tokenizer, stream[:_PROBE])
    return stream, used


def _check_language(where: str, tokenizer: Any, tokens: Sequence[int]) -> None:
    """Raise UserError when most tokens are unknown ones or halves of characters."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    decode = getattr(tokenizer, "decode", None)
    known: dict[int, bool] = {}
    for token in set(tokens):
        broken = token == unknown
        if not broken and decode is not None:
            broken = "\ufffd" in decode([token])
        known[token] = not broken
    share = sum(not known[token] for token in tokens) / max(len(tokens), 1)
    if share > _MAX_BROKEN:
        raise UserError(
            f"calibration {where}: {100 * share:.0f} % of its tokens are unknown to the model's "
            "tokenizer or halves of characters; is the text in a language of the model?"
        )

"""The bytes that each token of a vocabulary stands for, as grammars need them."""

from __future__ import annotations

import json
from functools import cache

from .errors import UserError
from .tokenizer import Tokenizer

SPACE = "\u2581"  # SentencePiece's mark for a space


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes of every token id; None for special tokens and for ids that no token has.

    Of byte-level BPE, and of SentencePiece vocabularies with byte fallback; `UserError` for others.
    """
    table = json.loads(tokenizer.to_json())
    vocabulary = table["model"].get("vocab")
    kinds = _decoders(table.get("decoder"))
    byte_level = "ByteLevel" in kinds
    if not isinstance(vocabulary, dict) or not (byte_level or "ByteFallback" in kinds):
        raise UserError(
            f"{tokenizer.folder}: structured output needs a byte-level or byte-fallback BPE "
            "vocabulary, and this tokenizer has neither: leave `structured` out"
        )
    found: list[bytes | None] = [None] * tokenizer.vocab_size
    for token, index in vocabulary.items():
        found[index] = _byte_level(token) if byte_level else _byte_fallback(token)
    for added in table.get("added_tokens", []):
        # Added tokens are text as it stands, in either kind of vocabulary.
        found[added["id"]] = None if added["special"] else added["content"].encode()
    return found


def _decoders(decoder: object) -> set[str]:
    """Types of a decoder and of what it is made of."""
    if not isinstance(decoder, dict):
        return set()
    inner = [_decoders(d) for d in decoder.get("decoders", [])]
    return {str(decoder.get("type"))}.union(*inner)


@cache
def _alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: printable bytes are themselves, the rest follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    alphabet = _alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()

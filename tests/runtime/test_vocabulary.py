"""The bytes of tokens are those of the text they came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.data import data_path
from helpers.grammars import DEMO

from smelt.runtime.errors import UserError
from smelt.runtime.tokenizer import Tokenizer
from smelt.runtime.vocabulary import token_bytes

TEXT = 'Tabs\tand "quotes", naïve 日本 😀\n  {"x": [1, 2]}\x07'


@pytest.mark.parametrize(("name", "before"), [("demo", b""), ("gpt2", b""), ("mistral_v1", b" ")])
def test_bytes_of_tokens_join_to_the_text(name: str, before: bytes) -> None:
    """SentencePiece's normalizer puts a space before a text."""
    tokenizer = Tokenizer(DEMO if name == "demo" else data_path(f"tokenizers/{name}"))
    table = token_bytes(tokenizer)
    assert len(table) == tokenizer.vocab_size
    found = [table[token] for token in tokenizer.encode(TEXT, add_special_tokens=False)]
    assert b"".join(part or b"?" for part in found) == before + TEXT.encode()


def test_special_tokens_have_none(tmp_path: Path) -> None:
    table = json.loads((DEMO / "tokenizer.json").read_text())
    added = dict(table["added_tokens"][0], id=1024, content="<tool ü>", special=False)
    table["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    found = token_bytes(Tokenizer(tmp_path))
    assert found[:5] == [None] * 5
    assert found[1024] == "<tool ü>".encode()
    assert None not in found[5:]


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    table = json.loads((DEMO / "tokenizer.json").read_text())
    table["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="byte-level or byte-fallback"):
        token_bytes(Tokenizer(tmp_path))

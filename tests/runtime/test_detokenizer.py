"""Pieces of text: together exactly the whole decoding, and never half a character."""

from __future__ import annotations

from functools import cache

import pytest
from helpers.data import data_path
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.detokenizer import UNFINISHED, Detokenizer, TextStream
from smelt.runtime.tokenizer import Tokenizer

FOLDERS = ("tokenizers/gpt2", "tokenizers/mistral_v1", "models/stories260K", "models/babyllama361")
TEXT = "Grüße, 你好 👩‍👩‍👧‍👦 and नमस्ते! \n\n  Some  code:\tif x: y += 1 \ufffd end"


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer(data_path(name))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    out = [detokenizer.push(token) for token in ids]
    return [*out, detokenizer.finish()]


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    some = st.integers(0, tokenizer.vocab_size - 1)
    low = st.integers(0, min(300, tokenizer.vocab_size - 1))  # bytes and special tokens
    ids = data.draw(st.lists(st.one_of(some, low), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_no_piece_holds_half_a_character(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    text = (text + TEXT).replace(UNFINISHED, "")
    ids = tokenizer.encode(text)
    out = pieces(tokenizer, ids)
    assert not any(UNFINISHED in piece for piece in out)
    assert "".join(out) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", FOLDERS)
def test_text_comes_early(name: str) -> None:
    tokenizer = tokenizer_of(name)
    out = pieces(tokenizer, tokenizer.encode("Once upon a time, there was a little girl."))
    assert sum(1 for piece in out if piece) > len(out) * 0.7
    assert out[-1] == ""


class Letters:
    """A tokenizer whose token i is the i-th string."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.parts[i] for i in token_ids)

    def is_byte(self, token_id: int) -> bool:
        return False

    def is_special(self, token_id: int) -> bool:
        return False


def stream(parts: list[str], stop: list[str]) -> tuple[list[str], bool]:
    text = TextStream(Letters(*parts), stop)
    out = []
    for i in range(len(parts)):
        piece, stopped = text.push(i)
        out.append(piece)
        if stopped:
            return out, True
    piece, stopped = text.finish()
    return [*out, piece], stopped


def test_stop_string_across_tokens() -> None:
    assert stream(["Hello", " wor", "ld END", "x"], [" world"]) == (["Hello", "", ""], True)
    assert stream(["ab", "ab", "c"], ["abc"]) == (["", "ab", ""], True)
    assert stream(["a", "b", "x"], ["abc"]) == (["", "", "abx", ""], False)
    assert stream(["a", "b"], ["abc"]) == (["", "", "ab"], False)


def test_the_first_of_several_stop_strings_counts() -> None:
    assert stream(["one two three"], ["three", "two"]) == (["one "], True)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", min_size=0, max_size=4), max_size=10),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_equal_a_search_in_the_whole(parts: list[str], stop: list[str]) -> None:
    whole = "".join(parts)
    found = [at for s in stop if (at := whole.find(s)) >= 0]
    out, stopped = stream(parts, stop)
    assert stopped == bool(found)
    if not stopped:
        assert "".join(out) == whole
    else:
        # A longer stop string that began earlier may complete later: what was printed is final.
        assert whole.startswith("".join(out))
        assert not any(s in "".join(out) for s in stop)

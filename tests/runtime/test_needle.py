"""Needles: what the prompts look like, and what the grid says of models that are known."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import torch
from helpers.fake_artifact import TEMPLATE, VOCAB, write_tokenizer

from smelt.runtime.chat_template import ChatTemplate
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.haystack import passkey, repeat
from smelt.runtime.needle import Haystack, default_lengths, prompts, retrieval
from smelt.runtime.tokenizer import Tokenizer

TEXT = "\n".join(
    f"Sentence {i} of this long text says nothing that matters to anyone here." for i in range(200)
)
DEPTHS = (0.0, 0.5, 1.0)
BOS = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(folder)


class Reader:
    """Answers right when the fact is among the last `sight` tokens, and guesses evenly if not."""

    def __init__(self, tokenizer: Tokenizer, fact: str, sight: int = 10**9) -> None:
        self.tokenizer, self.fact, self.sight = tokenizer, re.compile(fact), sight

    def __call__(self, tokens: list[list[int]], last: list[int]) -> list[torch.Tensor]:
        found = []
        for ids, count in zip(tokens, last, strict=True):
            logits = torch.zeros(count, VOCAB)
            key = self.fact.search(self.tokenizer.decode(ids[-self.sight :]))
            if key:
                answer = self.tokenizer.encode(f" {key.group(1)}", False)
                assert len(answer) == count
                logits[torch.arange(count), torch.tensor(answer)] = 100.0
            found.append(logits)
        return found


PASSKEY = r"Remember it: (\d{5}) is"


@pytest.mark.parametrize("template", [None, ChatTemplate(TEMPLATE, {"bos_token": "<|bos|>"})])
def test_passkey_prompts(tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    haystack = passkey(TEXT, template)
    *hidden, without = prompts(haystack, tokenizer, 1000, DEPTHS, Random(0))
    texts = [tokenizer.decode(list(p.tokens), skip_special_tokens=False) for p in hidden]
    key = re.search(PASSKEY, texts[0]).group(1)  # type: ignore[union-attr]
    for prompt, text in zip(hidden, texts, strict=True):
        assert prompt.tokens.count(BOS) == 1 and prompt.tokens[0] == BOS
        assert 900 < len(prompt.tokens) <= 1000
        assert prompt.answer == 6 and text.endswith(f"The pass key is {key}")
        assert text.count(key) == 3
        assert text.endswith(f"<|assistant|>The pass key is {key}") == (template is not None)
        # Apart from the fact, the haystack is the same.
        fact = f"The pass key is {key}. Remember it: {key} is the pass key. "
        assert text.replace(fact, "") == tokenizer.decode(list(without.tokens), False)
    places = [text.index("Remember it:") / len(text) for text in texts]
    assert places[0] < 0.2 < 0.4 < places[1] < 0.6 < 0.8 < places[2]


def test_prompts_follow_the_seed(tokenizer: Tokenizer) -> None:
    one, two, other = (
        prompts(passkey(TEXT), tokenizer, 500, DEPTHS, Random(seed)) for seed in (1, 1, 2)
    )
    assert one == two and one != other


def test_a_short_text_goes_round_and_round(tokenizer: Tokenizer) -> None:
    (hidden, _) = prompts(passkey("A b c d. E f g h."), tokenizer, 2000, (0.5,), Random(0))
    assert len(hidden.tokens) > 1950


def test_repeat_asks_for_the_second_half_of_a_hidden_sentence(tokenizer: Tokenizer) -> None:
    haystack = repeat(TEXT)
    hidden, without = prompts(haystack, tokenizer, 1000, (0.5,), Random(0))
    text = tokenizer.decode(list(hidden.tokens))
    answer = tokenizer.decode(list(hidden.tokens[-hidden.answer :]))
    asked = text[: -len(answer)].rpartition(". ")[2]
    assert text.count(asked + answer) == 2
    assert tokenizer.decode(list(without.tokens)).count(asked + answer) == 1
    assert len(answer.split()) > len(asked.split())


def test_a_model_that_reads_everything_finds_every_needle(tokenizer: Tokenizer) -> None:
    found = retrieval(
        passkey(TEXT), tokenizer, Reader(tokenizer, PASSKEY), (400, 800), DEPTHS, trials=2
    )
    assert [(c.length, c.depth) for c in found.cells] == [
        (length, depth) for length in (400, 800) for depth in DEPTHS
    ]
    assert {(c.found, c.tokens) for c in found.cells} == {(1.0, 1.0)}
    assert found.mean("gain") == pytest.approx(torch.tensor(VOCAB).log().item())
    assert found.to_json()["found"] == 1.0 and len(found.to_json()["cells"]) == 6


def test_a_model_that_sees_the_end_finds_what_is_there(tokenizer: Tokenizer) -> None:
    """Which is what a cache that loses old tokens looks like."""
    reader = Reader(tokenizer, PASSKEY, sight=300)
    found = retrieval(passkey(TEXT), tokenizer, reader, (350, 1000), DEPTHS, trials=2)
    shares = {(c.length, c.depth): c.found for c in found.cells}
    assert [shares[1000, depth] for depth in DEPTHS] == [0.0, 0.0, 1.0]
    assert shares[350, 0.5] == 1.0
    assert [c.gain for c in found.cells if c.length == 1000][:2] == [0.0, 0.0]
    assert found.mean("found") < 1


def test_progress_counts_prompts(tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, int]] = []
    retrieval(
        passkey(TEXT),
        tokenizer,
        Reader(tokenizer, PASSKEY),
        (400,),
        (0.0, 1.0),
        trials=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 6), (6, 6)]


def test_lengths_follow_the_context() -> None:
    assert default_lengths(128) == (128,)
    assert default_lengths(512) == (256, 512)
    assert default_lengths(131072) == (4096, 8192, 16384)


def test_nan_logits_are_an_error(tokenizer: Tokenizer) -> None:
    def broken(tokens: list[list[int]], last: list[int]) -> list[torch.Tensor]:
        return [torch.full((count, VOCAB), torch.nan) for count in last]

    with pytest.raises(SmeltError, match="hold NaN"):
        retrieval(passkey(TEXT), tokenizer, broken, (400,))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: passkey(" \n\n "), "the text is empty"),
        (lambda: repeat("Too short. Yes."), "none of 8 to 16 words"),
        (lambda: passkey(TEXT, ChatTemplate("{{ bos_token }}", {})), "leaves the user's text out"),
    ],
)
def test_mistakes_are_told(make: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()  # type: ignore[operator]


def test_a_length_without_room_is_told(tokenizer: Tokenizer) -> None:
    haystack: Haystack = passkey(TEXT)
    with pytest.raises(UserError, match="the question alone takes"):
        prompts(haystack, tokenizer, 100, DEPTHS, Random(0))


def test_the_demo_needle_is_asked_in_the_words_of_its_task() -> None:
    from smelt.models.demo import data, needle

    tokenizer = Tokenizer(Path(data.__file__).parent / "smelt-demo")
    hidden, without = prompts(needle.haystack(), tokenizer, 300, (0.5,), Random(0))
    text = tokenizer.decode(list(hidden.tokens), skip_special_tokens=False)
    told = re.search(r"<\|user\|>I have (an? \w+)\.<\|end\|><\|assistant\|>How nice", text)
    assert told is not None
    question = "<|user|>Which animal do I have?<|end|><|assistant|>"
    assert text.endswith(f"{question}You have {told.group(1)}.<|end|>")
    assert text.count("<|bos|>") == 1 and len(hidden.tokens) <= 300
    assert told.group(0) not in tokenizer.decode(list(without.tokens), False)
